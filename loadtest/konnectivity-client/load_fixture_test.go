//go:build go1.25

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// All times in these tests are of a clock that advances only while every
// goroutine waits, so they are exact.

// recorded is the samples of a run, times in milliseconds.
type recorded struct {
	names   []string
	ready   []float64
	done    float64
	latency [][3]float64
	overdue [][3]float64
	bytes   map[int]float64
	errors  []failure
}

type failure struct {
	workload int
	at       float64
	text     string
}

func (h *recorded) read(t *testing.T, out string) {
	t.Helper()
	h.bytes = map[int]float64{}
	for line := range strings.Lines(out) {
		var sample map[string]json.RawMessage
		if err := json.Unmarshal([]byte(line), &sample); err != nil || len(sample) != 1 {
			t.Fatalf("no sample: %q: %v", line, err)
		}
		for name, value := range sample {
			h.names = append(h.names, name)
			h.add(t, name, value)
		}
	}
}

func (h *recorded) add(t *testing.T, name string, value json.RawMessage) {
	t.Helper()
	into := func(v any) {
		if err := json.Unmarshal(value, v); err != nil {
			t.Fatalf("%s: %s: %v", name, value, err)
		}
	}
	var one float64
	var three [3]float64
	switch name {
	case "start":
		into(&one)
	case "ready":
		into(&one)
		h.ready = append(h.ready, one/1000)
	case "done":
		into(&one)
		h.done = one / 1000
	case "latency":
		into(&three)
		h.latency = append(h.latency, [3]float64{three[0], three[1] / 1000, three[2] / 1000})
	case "overdue":
		into(&three)
		h.overdue = append(h.overdue, [3]float64{three[0], three[1] / 1000, three[2] / 1000})
	case "bytes":
		into(&three)
		h.bytes[int(three[0])] += three[2]
	case "error":
		var f failure
		into(&[]any{&f.workload, &f.at, &f.text})
		f.at /= 1000
		h.errors = append(h.errors, f)
	default:
		t.Fatalf("no sample is called %q", name)
	}
}

// target serves connections as the plans' target does, or as a test says.
type target struct {
	serve func(c net.Conn)
	// dialing is called before each dial, if there is one.
	dialing func() error

	mu     sync.Mutex
	ends   []net.Conn
	dials  int
	closed bool
}

type pipeLink struct{ net.Conn }

func (l pipeLink) cut() { _ = l.Close() }

// Write gives the error that the library gives when the other end is gone.
func (l pipeLink) Write(b []byte) (int, error) {
	n, err := l.Conn.Write(b)
	if errors.Is(err, io.ErrClosedPipe) {
		err = io.EOF
	}
	return n, err
}

func (g *target) dial(string) (link, error) {
	if g.dialing != nil {
		if err := g.dialing(); err != nil {
			return nil, err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, net.ErrClosed
	}
	near, far := net.Pipe()
	g.dials++
	g.ends = append(g.ends, near, far)
	go func() {
		defer far.Close()
		g.serve(far)
	}()
	return pipeLink{near}, nil
}

func (g *target) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for _, c := range g.ends {
		_ = c.Close()
	}
}

// carry runs a plan of these workloads to its end, and then ends the connections
// that are left.
func (g *target) carry(t *testing.T, seconds float64, workloads string) *recorded {
	t.Helper()
	h := &recorded{}
	synctest.Test(t, func(t *testing.T) {
		p, err := readPlan(strings.NewReader(
			fmt.Sprintf(`{"seconds":%g,"target":"t:1","workloads":[%s]}`, seconds, workloads)))
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		begin := time.Now()
		if err := p.carryOut(&out, g.dial); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin).Seconds(); math.Abs(took-seconds) > 1e-5 {
			t.Errorf("the run took %v s, not %v s", took, seconds)
		}
		h.read(t, out.String())
		g.close()
		// Every goroutine wakes up and sees the end.
		time.Sleep(24 * time.Hour)
	})
	if first, last := h.names[0], h.names[len(h.names)-1]; first != "start" || last != "done" {
		t.Errorf("the samples begin with %s and end with %s", first, last)
	}
	if math.Abs(h.done-seconds*1000) > 0.01 {
		t.Errorf("done after %v ms", h.done)
	}
	return h
}

func (h *recorded) noErrors(t *testing.T) {
	t.Helper()
	if len(h.errors) > 0 {
		t.Errorf("errors: %v", h.errors)
	}
}

func (h *recorded) oneError(t *testing.T, at float64, text string) {
	t.Helper()
	if want := []failure{{0, at, text}}; !slices.Equal(h.errors, want) {
		t.Errorf("errors: %v, want %v", h.errors, want)
	}
}

func equal(t *testing.T, what string, got, want [][3]float64) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// tick is the time that the target takes for a chunk; without it a stream would
// never let the clock advance.
const tick = time.Millisecond

// serve serves one connection as the table of commands says.
func serve(c net.Conn) {
	var command [1]byte
	if _, err := io.ReadFull(c, command[:]); err != nil {
		return
	}
	switch command[0] {
	case wantEcho:
		_, _ = io.Copy(c, c)
	case wantZeros:
		sendZeros(c, 1<<62)
	case wantSink:
		for discard(c, 64<<10) == nil {
			time.Sleep(tick)
		}
	case wantFetch:
		if n, err := readNumber(c); err == nil {
			sendZeros(c, n)
		}
		_, _ = io.Copy(io.Discard, c)
	case wantWhole:
		if n, err := readNumber(c); err == nil {
			_ = discard(c, n)
		}
	case wantReceipt:
		n, err := readNumber(c)
		if err == nil && discard(c, n) == nil {
			time.Sleep(tick)
			_, _ = c.Write([]byte{1})
		}
		_, _ = io.Copy(io.Discard, c)
	case wantNoise:
		if seed, err := readNumber(c); err == nil {
			sendNoise(c, noise{seed: seed})
		}
	case wantCheck:
		if seed, err := readNumber(c); err == nil {
			checkNoise(c, noise{seed: seed})
		}
	case wantAnswers:
		for {
			n, err := readNumber(c)
			if err != nil || !sendZeros(c, n) {
				return
			}
		}
	case wantPadded:
		for {
			request, err := readNumber(c)
			if err != nil {
				return
			}
			answer, err := readNumber(c)
			if err != nil || discard(c, request-exchangeHeader) != nil || !sendZeros(c, answer) {
				return
			}
		}
	case wantLines:
		sendLines(c, 0)
	case wantHold:
		_, _ = io.Copy(io.Discard, c)
	}
}

func discard(c net.Conn, n uint64) error {
	_, err := io.CopyN(io.Discard, c, int64(n))
	return err
}

func readNumber(c net.Conn) (uint64, error) {
	var b [8]byte
	_, err := io.ReadFull(c, b[:])
	return binary.BigEndian.Uint64(b[:]), err
}

func sendZeros(c net.Conn, n uint64) bool {
	for n > 0 {
		time.Sleep(tick)
		// An odd size, so that reads end anywhere.
		b := make([]byte, min(n, 50_001))
		if _, err := c.Write(b); err != nil {
			return false
		}
		n -= uint64(len(b))
	}
	return true
}

func sendNoise(c net.Conn, n noise) {
	b := make([]byte, 50_001)
	for err := error(nil); err == nil; _, err = c.Write(b) {
		time.Sleep(tick)
		n.fill(b)
	}
}

// checkNoise reads to the first byte that is wrong.
func checkNoise(c net.Conn, n noise) {
	got, want := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		k, err := c.Read(got)
		n.fill(want[:k])
		if err != nil || !bytes.Equal(got[:k], want[:k]) {
			return
		}
		time.Sleep(tick)
	}
}

// sendLines sends lines whose time is wrong by off.
func sendLines(c net.Conn, off time.Duration) {
	size, _ := readNumber(c)
	interval, err := readNumber(c)
	for err == nil {
		line := make([]byte, size)
		binary.BigEndian.PutUint64(line, uint64(time.Now().Add(off).UnixNano()))
		time.Sleep(tick)
		_, err = c.Write(line)
		time.Sleep(time.Duration(interval)*time.Microsecond - tick)
	}
}
