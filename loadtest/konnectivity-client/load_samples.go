package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// flushEvery keeps well below the 100 ms that the output may be late.
	flushEvery = 50 * time.Millisecond
	// errorLength is enough to know an error by.
	errorLength = 200
)

// samples writes the samples of a run, one JSON value a line. Sessions only append
// to a buffer: thousands of samples a second wake the goroutine that writes no more
// often than a few do.
type samples struct {
	start time.Time
	// read counts each workload's payload bytes since its last sample.
	read []atomic.Uint64

	mu     sync.Mutex
	buffer []byte
	closed bool
	// taken is the other buffer: the one that is being written.
	taken []byte

	flush   chan struct{}
	flushed chan error
}

// newSamples begins with the run's start, and writes it before it returns.
func newSamples(w io.Writer, workloads int) (*samples, error) {
	s := &samples{
		start:   time.Now(),
		read:    make([]atomic.Uint64, workloads),
		flush:   make(chan struct{}),
		flushed: make(chan error, 1),
	}
	s.line("start", uint64(s.start.UnixNano()))
	if _, err := w.Write(s.take()); err != nil {
		return nil, fmt.Errorf("stdout: %w", err)
	}
	go func() { s.flushed <- s.writeAll(w) }()
	return s, nil
}

// writeAll writes until finish is called or writing fails.
func (s *samples) writeAll(w io.Writer) error {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for last := false; !last; {
		select {
		case <-tick.C:
			s.countBytes()
		case <-s.flush:
			last = true
		}
		if lines := s.take(); len(lines) > 0 {
			if _, err := w.Write(lines); err != nil {
				return fmt.Errorf("stdout: %w", err)
			}
		}
	}
	return nil
}

// broken gives the error that made writing impossible.
func (s *samples) broken() <-chan error {
	return s.flushed
}

// finish says that the run is over and waits until everything is written. What
// is said afterwards is lost.
func (s *samples) finish() error {
	s.countBytes()
	s.mu.Lock()
	s.append("done", s.at(time.Now()))
	s.closed = true
	s.mu.Unlock()
	select {
	case s.flush <- struct{}{}:
		return <-s.flushed
	case err := <-s.flushed:
		return err
	}
}

func (s *samples) ready() {
	s.line("ready", s.at(time.Now()))
}

// latency is an answer at now to what counts from then.
func (s *samples) latency(workload int, from, now time.Time) {
	s.line("latency", uint64(workload), s.at(from), micros(now.Sub(from)))
}

// overdue is no answer until now to what counts from then.
func (s *samples) overdue(workload int, from, now time.Time) {
	s.line("overdue", uint64(workload), s.at(from), micros(now.Sub(from)))
}

func (s *samples) failed(workload int, err error) {
	text := err.Error()
	if len(text) > errorLength {
		text = text[:errorLength]
	}
	// A string can always be encoded.
	quoted, _ := json.Marshal(text)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.buffer = fmt.Appendf(s.buffer, `{"error":[%d,%d,%s]}`+"\n", workload, s.at(time.Now()), quoted)
}

// countBytes says how much was read since the last time.
func (s *samples) countBytes() {
	for i := range s.read {
		if n := s.read[i].Swap(0); n > 0 {
			s.line("bytes", uint64(i), s.at(time.Now()), n)
		}
	}
}

// at is a time as samples have it.
func (s *samples) at(t time.Time) uint64 {
	return micros(t.Sub(s.start))
}

func micros(d time.Duration) uint64 {
	return uint64(max(d, 0) / time.Microsecond)
}

func (s *samples) line(name string, numbers ...uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.append(name, numbers...)
	}
}

// append writes by hand what encoding/json would take several times as long for.
func (s *samples) append(name string, numbers ...uint64) {
	b := append(s.buffer, `{"`...)
	b = append(b, name...)
	b = append(b, `":`...)
	if len(numbers) > 1 {
		b = append(b, '[')
	}
	for i, n := range numbers {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, n, 10)
	}
	if len(numbers) > 1 {
		b = append(b, ']')
	}
	s.buffer = append(b, "}\n"...)
}

// take gives what was said since the last time; it is good until the next time.
func (s *samples) take() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.buffer, s.taken = s.taken[:0], s.buffer
	return s.taken
}
