//go:build go1.25

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

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
		`{"seconds":0,"target":"t","workloads":[]}`:                                   "seconds must be",
		`{"seconds":1e9,"target":"t","workloads":[]}`:                                 "seconds must be",
		`{"seconds":1,"workloads":[]}`:                                                "no target",
		`{"seconds":1,"target":"t"}`:                                                  "no workloads",
		bad(`{"kind":"idle"}`):                                                        "no name",
		bad(`{"name":"a"}`):                                                           `no kind ""`,
		bad(`{"name":"a","kind":"Echo"}`):                                             `no kind "Echo"`,
		bad(`{"name":"a","kind":"idle","interval":1}`):                                `unknown field "interval"`,
		bad(`{"name":"a","kind":"idle","sessions":-1}`):                               "cannot unmarshal",
		bad(`{"name":"a","kind":"idle","sessions":1000000000}`):                       "sessions must be",
		bad(`{"name":"a","kind":"idle","interval_ms":-1}`):                            "interval_ms must be",
		bad(`{"name":"a","kind":"echo","size":1}`):                                    "echo needs an interval",
		bad(`{"name":"a","kind":"request","size":1}`):                                 "request needs an interval",
		bad(`{"name":"a","kind":"echo","interval_ms":1}`):                             "size of echo must be at least 1",
		bad(`{"name":"a","kind":"tail","size":7}`):                                    "size of tail must be at least 8",
		bad(`{"name":"a","kind":"dial","size":1000000000000}`):                        "size of dial must be at most",
		bad(`{"name":"a","kind":"request","interval_ms":1}`):                          "size of request must be at least 1",
		bad(`{"name":"a","kind":"echo","size":1,"interval_ms":0}`):                    "echo needs an interval",
		bad(`{"name":"a","kind":"exchange","exchanges":[{"request":16,"answer":1}]}`): "needs an interval",
		bad(`{"name":"a","kind":"short-connection"}`):                                 "exchanges are for",
		bad(`{"name":"a","kind":"idle","exchanges":[{"request":16,"answer":1}]}`):     "exchanges are for",
		bad(`{"name":"a","kind":"short-connection","exchanges":[{"request":15}]}`):    "a request has 16 to",
	} {
		_, err := readPlan(strings.NewReader(plan))
		if err == nil || !strings.Contains(err.Error(), want) {
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
		{"checked download", `"kind":"checked-download","sessions":2`, 0, 0, 2 * 995 * 50_001, 2, 0},
		{"checked upload", `"kind":"checked-upload"`, 0, 0, 0, 1, 0},
		// Three chunks each.
		{"fetch", `"kind":"fetch","size":150000`, 331, 3, 331 * 150_000, 332, 1},
		{"paced fetch", `"kind":"fetch","size":50001,"interval_ms":100`, 10, 1, 10 * 50_001, 10, 0},
		{"send", `"kind":"send","size":150000,"interval_ms":7`, 143, 1, 0, 143, 0},
		{"write-close", `"kind":"write-close","size":150000,"interval_ms":7`, 143, 0, 0, 143, 0},
		{
			"abandon", `"kind":"abandon","size":150000,"interval_ms":7`,
			142, 3, 142*150_000 + 50_001, 143, 1,
		},
		{"request", `"kind":"request","size":150000,"interval_ms":100`, 10, 3, 10 * 150_000, 1, 0},
		{
			"exchange", `"kind":"exchange","interval_ms":100,"exchanges":[{"request":512,"answer":150000}]`,
			10, 3, 10 * 150_000, 1, 0,
		},
		{
			"short connection", `"kind":"short-connection","interval_ms":100,"exchanges":
				[{"request":300,"answer":3000},{"request":1500,"answer":60000}]`,
			10, 3, 10 * 63_000, 10, 0,
		},
		{"tail", `"kind":"tail","size":100,"interval_ms":20`, 50, 1, 50 * 100, 1, 0},
		{"dial", `"kind":"dial","interval_ms":10`, 100, 0, 0, 100, 0},
		{"dial and echo", `"kind":"dial","interval_ms":10,"size":50,"sessions":2`, 200, 0, 0, 200, 0},
		{"idle", `"kind":"idle","sessions":1000`, 0, 0, 0, 1000, 0},
		{"stall", `"kind":"stall"`, 0, 0, 0, 1, 0},
		{"none", `"kind":"idle","sessions":0`, 0, 0, 0, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := &target{serve: serve}
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
	g := &target{serve: serve, dialing: func() error {
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
func TestHeldUpMessagesCountFromTheirDueTime(t *testing.T) {
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
		g := &target{serve: serve}
		h := g.carry(t, 0.14, `{"name":"a","sessions":4,"interval_ms":100,"kind":`+kind+`}`)
		h.noErrors(t)
		equal(t, "latencies of "+kind, h.latency, [][3]float64{
			{0, 0, 0}, {0, 25, 0}, {0, 50, 0}, {0, 75, 0}, {0, 100, 0}, {0, 125, 0},
		})
	}
}

// The answers take longer than the interval. What comes due meanwhile is left out, and
// the schedule stays.
func TestExchangesAreCarriedOutOneAtATime(t *testing.T) {
	g := &target{serve: func(c net.Conn) {
		_ = discard(c, 1)
		for discard(c, 20) == nil {
			time.Sleep(130 * time.Millisecond)
			_, _ = c.Write(make([]byte, 7))
		}
	}}
	h := g.carry(t, 0.66, `{"name":"a","kind":"exchange","interval_ms":100,
		"exchanges":[{"request":20,"answer":7}]}`)
	h.noErrors(t)
	equal(t, "latencies", h.latency, [][3]float64{{0, 0, 130}, {0, 200, 130}, {0, 400, 130}})
	equal(t, "overdue", h.overdue, [][3]float64{{0, 600, 60}})
}

func TestBrokenExchangeWaitsForTheNextAnswer(t *testing.T) {
	var served atomic.Bool
	g := &target{serve: func(c net.Conn) {
		if served.CompareAndSwap(false, true) {
			_ = discard(c, 1+20)
			time.Sleep(30 * time.Millisecond)
			return
		}
		serve(c)
	}}
	h := g.carry(t, 0.3, `{"name":"a","kind":"exchange","interval_ms":100,
		"exchanges":[{"request":20,"answer":7}]}`)
	h.oneError(t, 30, errEnded.Error())
	equal(t, "overdue", h.overdue, nil)
	equal(t, "latencies", h.latency, [][3]float64{{0, 0, 131}, {0, 130, 1}, {0, 230, 1}})
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
		`"kind":"checked-download"`,
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
			serve(c)
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
		serve(c)
	}}
	h := g.carry(t, 0.3, `{"name":"a","kind":"request","size":5,"interval_ms":1000}`)
	if len(h.errors) != 1 || h.errors[0].text != errNothing.Error() {
		t.Errorf("errors: %v", h.errors)
	}
}

// What breaks is one error, all its messages but the oldest are overdue then, and it goes on anew.
func TestBrokenSessionDialsAnew(t *testing.T) {
	var served atomic.Bool
	g := &target{serve: func(c net.Conn) {
		if served.CompareAndSwap(false, true) {
			_ = discard(c, 1)
			_, _ = io.CopyN(c, c, 3)
			time.Sleep(70 * time.Millisecond)
			return
		}
		serve(c)
	}}
	h := g.carry(t, 0.25, `{"name":"a","kind":"echo","size":3,"interval_ms":50}`)
	h.oneError(t, 70, errEnded.Error())
	equal(t, "overdue", h.overdue, nil)
	// The gap counts from the oldest request without an answer to the next answer.
	equal(t, "latencies", h.latency, [][3]float64{{0, 0, 0}, {0, 50, 120}, {0, 170, 0}, {0, 220, 0}})
	if g.dials != 2 {
		t.Errorf("%d dials", g.dials)
	}
}

// The first connection stalls and is cut, the second is cut before its first answer, and the third
// answers: that is one gap.
func TestGapGoesOnUntilAnAnswer(t *testing.T) {
	var served atomic.Int64
	g := &target{serve: func(c net.Conn) {
		switch served.Add(1) {
		case 1:
			_ = discard(c, 1)
			_, _ = io.CopyN(c, c, 3)
			_ = discard(c, 3)
			time.Sleep(120 * time.Millisecond)
		case 2:
			_ = discard(c, 1+3)
		default:
			serve(c)
		}
	}}
	h := g.carry(t, 0.45, `{"name":"a","kind":"echo","size":3,"interval_ms":50}`)
	want := []failure{{0, 170, errEnded.Error()}, {0, 270, errEnded.Error()}}
	if !slices.Equal(h.errors, want) {
		t.Errorf("errors: %v", h.errors)
	}
	equal(t, "latencies", h.latency, [][3]float64{{0, 0, 0}, {0, 50, 320}, {0, 370, 0}, {0, 420, 0}})
	equal(t, "overdue", h.overdue, [][3]float64{{0, 100, 70}, {0, 150, 20}, {0, 270, 0}})
}

func TestGapWithoutAnEndIsOverdue(t *testing.T) {
	var served atomic.Bool
	g := &target{serve: func(c net.Conn) {
		if served.CompareAndSwap(false, true) {
			_ = discard(c, 1)
			_, _ = io.CopyN(c, c, 3)
			return
		}
		_, _ = io.Copy(io.Discard, c)
	}}
	h := g.carry(t, 0.13, `{"name":"a","kind":"echo","size":3,"interval_ms":50}`)
	h.oneError(t, 0, errEnded.Error())
	// Nothing waited when it was cut.
	slices.SortFunc(h.overdue, func(a, b [3]float64) int { return int(a[1] - b[1]) })
	equal(t, "overdue", h.overdue, [][3]float64{{0, 0, 130}, {0, 100, 30}})
}

func TestEchoFindsBytesThatAreLostDoubledOrSwapped(t *testing.T) {
	for name, tamper := range map[string]func(b []byte) []byte{
		"lost":    func(b []byte) []byte { return append(slices.Clone(b[:10]), b[11:]...) },
		"doubled": func(b []byte) []byte { return slices.Insert(slices.Clone(b), 10, b[10]) },
		"swapped": func(b []byte) []byte {
			b = slices.Clone(b)
			// Equal neighbours have no order.
			for k := 10; ; k++ {
				if b[k] != b[k+1] {
					b[k], b[k+1] = b[k+1], b[k]
					return b
				}
			}
		},
		"message lost":    func(b []byte) []byte { return nil },
		"message doubled": func(b []byte) []byte { return append(slices.Clone(b), b...) },
	} {
		var served atomic.Bool
		g := &target{serve: func(c net.Conn) {
			if !served.CompareAndSwap(false, true) {
				serve(c)
				return
			}
			_ = discard(c, 1)
			b := make([]byte, 64)
			for k := 0; ; k++ {
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				answer := b
				if k == 2 {
					answer = tamper(b)
				}
				if _, err := c.Write(answer); err != nil {
					return
				}
			}
		}}
		h := g.carry(t, 0.3, `{"name":"a","kind":"echo","size":64,"interval_ms":20}`)
		if len(h.errors) != 1 || h.errors[0].text != errContent.Error() {
			t.Errorf("%s: errors %v", name, h.errors)
		}
	}
}

// An upload ends when the target does, and says that it was cut.
func TestCheckedUploadIsWhatTheSeedSays(t *testing.T) {
	var served atomic.Bool
	g := &target{serve: func(c net.Conn) {
		if !served.CompareAndSwap(false, true) {
			serve(c)
			return
		}
		_ = discard(c, 1)
		seed, _ := readNumber(c)
		// Another stream is wrong at once.
		checkNoise(c, noise{seed: seed + 1})
	}}
	h := g.carry(t, 0.3, `{"name":"a","kind":"checked-upload"}`)
	h.oneError(t, 0, errEnded.Error())
	if g.dials != 2 {
		t.Errorf("%d dials", g.dials)
	}
}

func TestNoise(t *testing.T) {
	n := noise{seed: 1234567}
	b := make([]byte, 24)
	for k := range b {
		n.fill(b[k : k+1])
	}
	// The first words of SplitMix64 with this seed.
	for k, want := range []uint64{6457827717110365317, 3203168211198807973, 9817491932198370423} {
		if got := binary.BigEndian.Uint64(b[8*k:]); got != want {
			t.Errorf("word %d: %d", k, got)
		}
	}
}

func TestEveryStayingSessionDialsAnew(t *testing.T) {
	for _, workload := range []string{
		`"kind":"download"`,
		`"kind":"upload"`,
		`"kind":"checked-download"`,
		`"kind":"checked-upload"`,
		`"kind":"request","size":5,"interval_ms":10`,
		`"kind":"tail","size":20,"interval_ms":10`,
	} {
		g := &target{serve: func(c net.Conn) { _ = discard(c, 1) }}
		h := g.carry(t, 0.25, `{"name":"a",`+workload+`}`)
		ended := errEnded.Error()
		want := []failure{{0, 0, ended}, {0, 100, ended}, {0, 200, ended}}
		if !slices.Equal(h.errors, want) || g.dials != 3 {
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
	g := &target{serve: serve, dialing: func() error {
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
	g := &target{serve: serve, dialing: func() error {
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
	g := &target{serve: serve}
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

func TestEndsWhenItsReaderIsGone(t *testing.T) {
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
