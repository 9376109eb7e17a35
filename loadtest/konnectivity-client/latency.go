package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"slices"
	"time"
)

// setupPing sends on a schedule that does not wait for the answers. A ping that
// is late because an earlier write blocked counts from when it was due, so that
// a stall shows in every ping it delayed.
func setupPing(fs *flag.FlagSet) func(*dialer) error {
	count := fs.Int("count", 100, "`number` of pings")
	interval := fs.Duration("interval", 10*time.Millisecond, "time between pings")
	size := fs.Int("bytes", 64, "bytes per ping")
	return func(d *dialer) error {
		if err := errors.Join(
			atLeast("count", *count, 1),
			atLeast("interval", *interval, time.Nanosecond),
			atLeast("bytes", *size, 1),
		); err != nil {
			return err
		}
		c, err := d.dial()
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()

		// Room for all, so that the schedule never waits for the reader.
		sent := make(chan time.Time, *count)
		writing := make(chan error, 1)
		go func() {
			writing <- sendPings(c, sent, *count, *interval, *size)
			close(sent)
		}()
		latencies := make([]time.Duration, 0, *count)
		got := make([]byte, *size)
		for at := range sent {
			i := len(latencies)
			if _, err := io.ReadFull(c, got); err != nil {
				c.cut()
				return fmt.Errorf("ping %d: read error %q, write error %q", i, err, errorText(<-writing))
			}
			latencies = append(latencies, time.Since(at))
			if !isPing(got, uint64(i)) {
				return fmt.Errorf("ping %d: the answer differs from what was sent", i)
			}
		}
		if err := <-writing; err != nil {
			return err
		}
		slices.Sort(latencies)
		printJSON(struct {
			P50   float64 `json:"p50_ms"`
			P99   float64 `json:"p99_ms"`
			Max   float64 `json:"max_ms"`
			Count int     `json:"count"`
		}{quantile(latencies, 0.50), quantile(latencies, 0.99), quantile(latencies, 1), len(latencies)})
		return nil
	}
}

// sendPings writes the pings and gives the time each one counts from.
func sendPings(
	w io.Writer, sent chan<- time.Time, count int, interval time.Duration, size int,
) error {
	start := time.Now()
	ping := make([]byte, size)
	for i := range count {
		from, _ := whenDue(start.Add(time.Duration(i)*interval), nil)
		sent <- from
		fillPing(ping, uint64(i))
		if _, err := w.Write(ping); err != nil {
			return fmt.Errorf("ping %d: write: %w", i, err)
		}
	}
	return nil
}

// whenDue waits until due and gives the time that a message sent then counts
// from. A timer that fires late adds no latency; but a sender that comes only
// after the message was due has been held up by earlier ones. It is false if stop
// is closed first.
func whenDue(due time.Time, stop <-chan struct{}) (from time.Time, ok bool) {
	select {
	case <-stop:
		return time.Time{}, false
	default:
	}
	wait := time.Until(due)
	if wait <= 0 {
		return due, true
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return time.Now(), true
	case <-stop:
		return time.Time{}, false
	}
}

// fillPing makes b ping i: its number, again and again. The low byte goes first,
// so that even one-byte pings differ.
func fillPing(b []byte, i uint64) {
	var number [8]byte
	binary.LittleEndian.PutUint64(number[:], i)
	for n := copy(b, number[:]); n < len(b); {
		n += copy(b[n:], b[:n])
	}
}

// isPing reports whether b is ping i.
func isPing(b []byte, i uint64) bool {
	var number [8]byte
	binary.LittleEndian.PutUint64(number[:], i)
	first := min(len(b), len(number))
	// What repeats itself is the same when it is moved on by one repetition.
	return bytes.Equal(b[:first], number[:first]) && bytes.Equal(b[first:], b[:len(b)-first])
}

// quantile is the nearest-rank quantile of sorted, in milliseconds.
func quantile(sorted []time.Duration, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(math.Ceil(q * float64(len(sorted))))
	return float64(sorted[max(rank, 1)-1]) / float64(time.Millisecond)
}
