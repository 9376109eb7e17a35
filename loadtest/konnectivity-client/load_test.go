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
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// All times in these tests are of a clock that stands still unless everybody
// waits, so they are exact.

// happened is the samples of a run, times in milliseconds.
type happened struct {
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

func (h *happened) read(t *testing.T, out string) {
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

func (h *happened) add(t *testing.T, name string, value json.RawMessage) {
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

// target serves connections as the plans' target does, or as a test wants it to.
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

// carry runs a plan of these workloads until the end, and then ends everything
// that it left behind.
func (g *target) carry(t *testing.T, seconds float64, workloads string) *happened {
	t.Helper()
	h := &happened{}
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
		// Everybody wakes up and finds that out.
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

func (h *happened) noErrors(t *testing.T) {
	t.Helper()
	if len(h.errors) > 0 {
		t.Errorf("errors: %v", h.errors)
	}
}

func (h *happened) oneError(t *testing.T, at float64, text string) {
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

// tick is what the target takes for a chunk; without it a stream would never
// let the clock go on.
const tick = time.Millisecond

// obey serves one connection as the table of commands says.
func obey(c net.Conn) {
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
	case wantAnswers:
		for {
			n, err := readNumber(c)
			if err != nil || !sendZeros(c, n) {
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

func TestPlans(t *testing.T) {
	p, err := readPlan(strings.NewReader(` {"seconds": 20.0, "target": "10.0.0.1:80", "comment": "",
		"workloads": [{"name": "keys", "kind": "echo", "size": 50, "interval_ms": 12.5}]} `))
	if err != nil {
		t.Fatal(err)
	}
	w := p.Workloads[0]
	if p.Seconds != 20 || p.Target != "10.0.0.1:80" || *w.Name != "keys" || w.Kind != "echo" ||
		w.Sessions != 1 || w.Size != 50 || w.interval() != 12500*time.Microsecond {
		t.Errorf("read as %+v", p)
	}
	bad := func(workload string) string {
		return `{"seconds":1,"target":"t","workloads":[` + workload + `]}`
	}
	for plan, want := range map[string]string{
		``:                          "unexpected end",
		`{"seconds":1,"target":"t"`: "unexpected end",
		`null`:                      "seconds must be",
		bad(``) + `{}`:              "after top-level value",
		`{"seconds":0,"target":"t","workloads":[]}`:                "seconds must be",
		`{"seconds":1e9,"target":"t","workloads":[]}`:              "seconds must be",
		`{"seconds":1,"workloads":[]}`:                             "no target",
		`{"seconds":1,"target":"t"}`:                               "no workloads",
		bad(`{"kind":"idle"}`):                                     "no name",
		bad(`{"name":"a"}`):                                        `no kind ""`,
		bad(`{"name":"a","kind":"Echo"}`):                          `no kind "Echo"`,
		bad(`{"name":"a","kind":"idle","interval":1}`):             `unknown field "interval"`,
		bad(`{"name":"a","kind":"idle","sessions":-1}`):            "cannot unmarshal",
		bad(`{"name":"a","kind":"idle","sessions":1000000000}`):    "sessions must be",
		bad(`{"name":"a","kind":"idle","interval_ms":-1}`):         "interval_ms must be",
		bad(`{"name":"a","kind":"echo","size":1}`):                 "echo needs an interval",
		bad(`{"name":"a","kind":"request","size":1}`):              "request needs an interval",
		bad(`{"name":"a","kind":"echo","interval_ms":1}`):          "size of echo must be at least 1",
		bad(`{"name":"a","kind":"tail","size":7}`):                 "size of tail must be at least 8",
		bad(`{"name":"a","kind":"dial","size":1000000000000}`):     "size of dial must be at most",
		bad(`{"name":"a","kind":"request","interval_ms":1}`):       "size of request must be at least 1",
		bad(`{"name":"a","kind":"echo","size":1,"interval_ms":0}`): "echo needs an interval",
	} {
		if _, err := readPlan(strings.NewReader(plan)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", plan, err, want)
		}
	}
}

func TestPings(t *testing.T) {
	for size := 1; size < 40; size++ {
		b := make([]byte, size)
		fillPing(b, 0x0807060504030201)
		for i := range b {
			if b[i] != byte(i%8+1) {
				t.Fatalf("ping of %d bytes: %v", size, b)
			}
			if !isPing(b, 0x0807060504030201) {
				t.Fatalf("%v is no ping", b)
			}
			b[i]++
			if isPing(b, 0x0807060504030201) {
				t.Fatalf("byte %d of %v is wrong", i, b)
			}
			b[i]--
		}
	}
}

func TestEveryKind(t *testing.T) {
	for _, c := range []struct {
		name, workload string
		latencies      int
		each           float64
		bytes          float64
		dials          int
		overdue        int
	}{
		{"echo", `"kind":"echo","size":20,"interval_ms":10,"sessions":3`, 299, 0, 0, 3, 0},
		{"download", `"kind":"download","sessions":2`, 0, 0, 2 * 995 * 50_001, 2, 0},
		{"upload", `"kind":"upload"`, 0, 0, 0, 1, 0},
		// Three chunks each.
		{"fetch", `"kind":"fetch","size":150000`, 331, 3, 331 * 150_000, 332, 1},
		{"paced fetch", `"kind":"fetch","size":50001,"interval_ms":100`, 10, 1, 10 * 50_001, 10, 0},
		{"send", `"kind":"send","size":150000,"interval_ms":7`, 143, 1, 0, 143, 0},
		{"write-close", `"kind":"write-close","size":150000,"interval_ms":7`, 143, 0, 0, 143, 0},
		{"abandon", `"kind":"abandon","size":150000,"interval_ms":7`, 142, 3, 142*150_000 + 50_001, 143, 1},
		{"request", `"kind":"request","size":150000,"interval_ms":100`, 10, 3, 10 * 150_000, 1, 0},
		{"tail", `"kind":"tail","size":100,"interval_ms":20`, 50, 1, 50 * 100, 1, 0},
		{"dial", `"kind":"dial","interval_ms":10`, 100, 0, 0, 100, 0},
		{"dial and echo", `"kind":"dial","interval_ms":10,"size":50,"sessions":2`, 200, 0, 0, 200, 0},
		{"idle", `"kind":"idle","sessions":1000`, 0, 0, 0, 1000, 0},
		{"stall", `"kind":"stall"`, 0, 0, 0, 1, 0},
		{"none", `"kind":"idle","sessions":0`, 0, 0, 0, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := &target{serve: obey}
			// The end is at no time at which something else happens as well.
			h := g.carry(t, 0.9955, `{"name":"a",`+c.workload+`}`)
			h.noErrors(t)
			if !slices.Equal(h.ready, []float64{0}) {
				t.Errorf("ready: %v", h.ready)
			}
			if len(h.latency) != c.latencies || len(h.overdue) != c.overdue {
				t.Errorf("%d latencies, want %d; overdue: %v", len(h.latency), c.latencies, h.overdue)
			}
			for _, l := range h.latency {
				if l[2] != c.each {
					t.Fatalf("took %v ms, want %v", l[2], c.each)
				}
			}
			if got := h.bytes[0]; got < c.bytes || got > c.bytes+150_000 || (c.bytes == 0) != (got == 0) {
				t.Errorf("%v bytes, want %v", got, c.bytes)
			}
			if g.dials != c.dials {
				t.Errorf("%d dials, want %d", g.dials, c.dials)
			}
		})
	}
}

func TestDialsOneAfterAnother(t *testing.T) {
	g := &target{serve: obey, dialing: func() error {
		time.Sleep(30 * time.Millisecond)
		return nil
	}}
	h := g.carry(t, 0.1, `{"name":"a","kind":"idle"},{"name":"b","kind":"dial","size":9}`)
	h.noErrors(t)
	equal(t, "latencies", h.latency, [][3]float64{{1, 0, 30}, {1, 30, 30}, {1, 60, 30}})
	equal(t, "overdue", h.overdue, [][3]float64{{1, 90, 10}})
	if !slices.Equal(h.ready, []float64{30}) {
		t.Errorf("ready: %v", h.ready)
	}
}

// The answers take longer than the interval, and the messages are sent all the same.
func TestScheduleDoesNotWaitForAnswers(t *testing.T) {
	g := &target{serve: func(c net.Conn) {
		_ = discard(c, 1)
		for {
			b := make([]byte, 3)
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			time.AfterFunc(250*time.Millisecond, func() { _, _ = c.Write(b) })
		}
	}}
	h := g.carry(t, 0.54, `{"name":"a","kind":"echo","size":3,"interval_ms":100}`)
	h.noErrors(t)
	equal(t, "latencies", h.latency, [][3]float64{{0, 0, 250}, {0, 100, 250}, {0, 200, 250}})
	equal(t, "overdue", h.overdue, [][3]float64{{0, 300, 240}, {0, 400, 140}, {0, 500, 40}})
}

// While the target does not read, the writer is held up; what is late by that
// counts from when it was due.
func TestHeldUpMessagesCountFromWhenTheyWereDue(t *testing.T) {
	g := &target{serve: func(c net.Conn) {
		_ = discard(c, 1)
		time.Sleep(350 * time.Millisecond)
		_, _ = io.Copy(c, c)
	}}
	h := g.carry(t, 0.45, `{"name":"a","kind":"echo","size":3,"interval_ms":100}`)
	h.noErrors(t)
	equal(t, "latencies", h.latency,
		[][3]float64{{0, 0, 350}, {0, 100, 250}, {0, 200, 150}, {0, 300, 50}, {0, 400, 0}})
	equal(t, "overdue", h.overdue, nil)
}

// A target that stalls makes everything overdue, also what could not even be sent.
func TestStalledTargetIsOverdue(t *testing.T) {
	g := &target{serve: func(c net.Conn) {
		_ = discard(c, 1)
		_, _ = io.CopyN(c, c, 2*3)
		_ = discard(c, 3)
		time.Sleep(time.Hour)
	}}
	h := g.carry(t, 0.55, `{"name":"a","kind":"echo","size":3,"interval_ms":100}`)
	h.noErrors(t)
	equal(t, "latencies", h.latency, [][3]float64{{0, 0, 0}, {0, 100, 0}})
	equal(t, "overdue", h.overdue,
		[][3]float64{{0, 200, 350}, {0, 300, 250}, {0, 400, 150}, {0, 500, 50}})
}

func TestStalledTransfersAreOverdue(t *testing.T) {
	for _, kind := range []string{"fetch", "send"} {
		g := &target{serve: func(c net.Conn) { time.Sleep(time.Hour) }}
		h := g.carry(t, 0.5, `{"name":"a","kind":"`+kind+`","size":3,"sessions":2}`)
		h.noErrors(t)
		equal(t, "overdue "+kind, h.overdue, [][3]float64{{0, 0, 500}, {0, 0, 500}})
	}
}

func TestSessionsAreSpreadOverTheInterval(t *testing.T) {
	for _, kind := range []string{`"echo","size":3`, `"dial"`} {
		g := &target{serve: obey}
		h := g.carry(t, 0.14, `{"name":"a","sessions":4,"interval_ms":100,"kind":`+kind+`}`)
		h.noErrors(t)
		equal(t, "latencies of "+kind, h.latency, [][3]float64{
			{0, 0, 0}, {0, 25, 0}, {0, 50, 0}, {0, 75, 0}, {0, 100, 0}, {0, 125, 0},
		})
	}
}

// corrupted changes one byte of what the target writes.
type corrupted struct {
	net.Conn
	after int
}

func (c *corrupted) Write(b []byte) (int, error) {
	if c.after >= 0 && c.after < len(b) {
		b = slices.Clone(b)
		b[c.after]++
	}
	c.after -= len(b)
	return c.Conn.Write(b)
}

func TestWrongContentIsAnError(t *testing.T) {
	for _, workload := range []string{
		`"kind":"echo","size":20,"interval_ms":50`,
		`"kind":"download"`,
		`"kind":"fetch","size":100000`,
		`"kind":"request","size":100000,"interval_ms":50`,
		`"kind":"tail","size":20,"interval_ms":50`,
		`"kind":"dial","size":30,"interval_ms":50`,
	} {
		var served atomic.Bool
		g := &target{serve: func(c net.Conn) {
			if served.CompareAndSwap(false, true) {
				// Of a line only the time is known, and this byte of it is hours.
				c = &corrupted{c, 1}
			}
			obey(c)
		}}
		h := g.carry(t, 0.3, `{"name":"a",`+workload+`}`)
		if len(h.errors) != 1 || h.errors[0].text != errContent.Error() {
			t.Errorf("%s: errors %v", workload, h.errors)
		}
		if len(h.latency) == 0 && h.bytes[0] < 1_000_000 {
			t.Errorf("%s: did not go on", workload)
		}
	}
}

func TestUnaskedAnswerIsAnError(t *testing.T) {
	var served atomic.Bool
	g := &target{serve: func(c net.Conn) {
		if served.CompareAndSwap(false, true) {
			_ = discard(c, 1)
			_, _ = c.Write(make([]byte, 2*5))
			_, _ = io.Copy(io.Discard, c)
			return
		}
		obey(c)
	}}
	h := g.carry(t, 0.3, `{"name":"a","kind":"request","size":5,"interval_ms":1000}`)
	if len(h.errors) != 1 || h.errors[0].text != errNothing.Error() {
		t.Errorf("errors: %v", h.errors)
	}
}

// What breaks is one error, its messages are overdue then, and it goes on anew.
func TestBrokenSessionDialsAnew(t *testing.T) {
	var served atomic.Bool
	g := &target{serve: func(c net.Conn) {
		if served.CompareAndSwap(false, true) {
			_ = discard(c, 1)
			_, _ = io.CopyN(c, c, 3)
			time.Sleep(70 * time.Millisecond)
			return
		}
		obey(c)
	}}
	h := g.carry(t, 0.25, `{"name":"a","kind":"echo","size":3,"interval_ms":50}`)
	h.oneError(t, 70, errEnded.Error())
	equal(t, "overdue", h.overdue, [][3]float64{{0, 50, 20}})
	equal(t, "latencies", h.latency, [][3]float64{{0, 0, 0}, {0, 170, 0}, {0, 220, 0}})
	if g.dials != 2 {
		t.Errorf("%d dials", g.dials)
	}
}

func TestEveryStayingSessionDialsAnew(t *testing.T) {
	for _, workload := range []string{
		`"kind":"download"`,
		`"kind":"upload"`,
		`"kind":"request","size":5,"interval_ms":10`,
		`"kind":"tail","size":20,"interval_ms":10`,
	} {
		g := &target{serve: func(c net.Conn) { _ = discard(c, 1) }}
		h := g.carry(t, 0.25, `{"name":"a",`+workload+`}`)
		ended := errEnded.Error()
		if !slices.Equal(h.errors, []failure{{0, 0, ended}, {0, 100, ended}, {0, 200, ended}}) || g.dials != 3 {
			t.Errorf("%s: %d dials, errors %v", workload, g.dials, h.errors)
		}
	}
}

func TestFailedDialsHoldUpNothing(t *testing.T) {
	refused := errors.New("refused <&> \xff" + strings.Repeat("!", 1000))
	for workload, want := range map[string]int{
		`"kind":"echo","size":3,"interval_ms":50`: 5,
		`"kind":"idle"`:                  1,
		`"kind":"stall"`:                 1,
		`"kind":"fetch"`:                 5,
		`"kind":"dial"`:                  5,
		`"kind":"dial","interval_ms":10`: 45,
	} {
		g := &target{dialing: func() error { return refused }}
		h := g.carry(t, 0.445, `{"name":"a",`+workload+`}`)
		if len(h.errors) != want || !strings.HasPrefix(h.errors[0].text, "refused <&> \ufffd!") {
			t.Errorf("%s: %d errors: %v", workload, len(h.errors), h.errors)
		}
		if !slices.Equal(h.ready, []float64{0}) || len(h.overdue) > 0 {
			t.Errorf("%s: ready %v, overdue %v", workload, h.ready, h.overdue)
		}
	}
}

func TestStormsAreLimited(t *testing.T) {
	var mu sync.Mutex
	now, most := 0, 0
	g := &target{serve: obey, dialing: func() error {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		time.Sleep(10 * time.Millisecond)
		mu.Lock()
		now--
		mu.Unlock()
		return nil
	}}
	h := g.carry(t, 1, `{"name":"a","kind":"idle","sessions":200}`)
	h.noErrors(t)
	if most != dialsAtOnce || !slices.Equal(h.ready, []float64{40}) {
		t.Errorf("%d dials at once, ready %v", most, h.ready)
	}
}

func TestDialsUnderWayAreLimited(t *testing.T) {
	g := &target{serve: obey, dialing: func() error {
		time.Sleep(time.Hour)
		return nil
	}}
	h := g.carry(t, 0.2995, `{"name":"a","kind":"dial","interval_ms":1}`)
	if len(h.overdue) != dialsUnderWay || h.overdue[0][0] != 0 {
		t.Errorf("%d overdue", len(h.overdue))
	}
	if len(h.errors) != 300-dialsUnderWay || h.errors[0] != (failure{0, 256, errTooMany.Error()}) {
		t.Errorf("%d errors: %v", len(h.errors), h.errors)
	}
}

func TestSamplesName(t *testing.T) {
	g := &target{serve: obey}
	h := g.carry(t, 0.09, `{"name":"a","kind":"download"},{"name":"b","kind":"download"},
		{"name":"c","kind":"echo","size":9,"interval_ms":50}`)
	h.noErrors(t)
	if h.bytes[0] == 0 || h.bytes[1] == 0 || len(h.bytes) != 2 {
		t.Errorf("bytes: %v", h.bytes)
	}
	equal(t, "latencies", h.latency, [][3]float64{{2, 0, 0}, {2, 50, 0}})
}

func TestSamplesAreWrittenInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		defer r.Close()
		begin := time.Now()
		var s *samples
		made := make(chan error, 1)
		go func() {
			var err error
			s, err = newSamples(w, 1)
			made <- err
		}()
		b := make([]byte, 1000)
		n, err := r.Read(b)
		if want := fmt.Sprintf("{\"start\":%d}\n", begin.UnixNano()); string(b[:n]) != want {
			t.Fatalf("%q, %v; want %q", b[:n], err, want)
		}
		if err := <-made; err != nil {
			t.Fatal(err)
		}
		s.latency(0, begin, begin.Add(7*time.Microsecond))
		s.read[0].Add(9)
		n, _ = r.Read(b)
		if want := "{\"latency\":[0,0,7]}\n{\"bytes\":[0,50000,9]}\n"; string(b[:n]) != want {
			t.Errorf("%q, want %q", b[:n], want)
		}
		if late := time.Since(begin); late > 100*time.Millisecond {
			t.Errorf("after %v", late)
		}
		finished := make(chan error, 1)
		go func() { finished <- s.finish() }()
		n, _ = r.Read(b)
		if want := "{\"done\":50000}\n"; string(b[:n]) != want {
			t.Errorf("%q, want %q", b[:n], want)
		}
		if err := <-finished; err != nil {
			t.Error(err)
		}
		s.ready()
		s.failed(0, errContent)
		if rest := s.take(); len(rest) > 0 {
			t.Errorf("after the end: %q", rest)
		}
	})
}

// brokenAfter takes a number of writes.
type brokenAfter int

func (b *brokenAfter) Write(p []byte) (int, error) {
	if *b--; *b < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

func TestNobodyListensAnyMore(t *testing.T) {
	for takes := range brokenAfter(3) {
		synctest.Test(t, func(t *testing.T) {
			p, err := readPlan(strings.NewReader(`{"seconds":100,"target":"t","workloads":[]}`))
			if err != nil {
				t.Fatal(err)
			}
			if err := p.carryOut(&takes, nil); !errors.Is(err, io.ErrClosedPipe) && takes >= 0 {
				t.Errorf("carried out: %v", err)
			}
		})
	}
}
