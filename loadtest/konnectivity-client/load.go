package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// dialsAtOnce keeps a storm of thousands of dials from being one of timeouts.
	dialsAtOnce = 64
	// dialsUnderWay is how far behind its schedule a workload of dials may be.
	dialsUnderWay = 256
	// redialPause is what a session waits for after a failure.
	redialPause = 100 * time.Millisecond

	// The limits are there to make nonsense an error instead of a crash.
	longest     = 1000 * time.Hour
	maxMessage  = 64 << 20
	maxSessions = 1 << 20
)

// plan is what goes through the tunnel in one run.
type plan struct {
	Seconds   float64        `json:"seconds"`
	Target    string         `json:"target"`
	Workloads []workloadPlan `json:"workloads"`
}

// workloadPlan is sessions of one kind.
type workloadPlan struct {
	Name       *string    `json:"name"`
	Kind       string     `json:"kind"`
	Target     string     `json:"target"`
	Sessions   uint32     `json:"sessions"`
	Size       uint64     `json:"size"`
	IntervalMS float64    `json:"interval_ms"`
	Exchanges  []exchange `json:"exchanges"`
}

// exchange is a request and its answer.
type exchange struct {
	Request uint64 `json:"request"`
	Answer  uint64 `json:"answer"`
}

// UnmarshalJSON knows the number of sessions if none is given, and takes no
// fields that it does not know, so that a misspelt one cannot change a run.
func (w *workloadPlan) UnmarshalJSON(b []byte) error {
	type fields workloadPlan
	f := fields{Sessions: 1}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return err
	}
	*w = workloadPlan(f)
	return nil
}

func (w workloadPlan) interval() time.Duration {
	return time.Duration(w.IntervalMS * float64(time.Millisecond))
}

func (w workloadPlan) check() error {
	k, known := kinds[w.Kind]
	switch {
	case w.Name == nil:
		return errors.New("no name")
	case !known:
		return fmt.Errorf("%s: no kind %q", *w.Name, w.Kind)
	case w.Sessions > maxSessions:
		return fmt.Errorf("%s: sessions must be at most %d", *w.Name, maxSessions)
	case w.Size < k.minSize:
		return fmt.Errorf("%s: the size of %s must be at least %d", *w.Name, w.Kind, k.minSize)
	case k.buffered && w.Size > maxMessage:
		return fmt.Errorf("%s: the size of %s must be at most %d", *w.Name, w.Kind, maxMessage)
	case !(w.IntervalMS >= 0 && w.IntervalMS <= float64(longest.Milliseconds())):
		return fmt.Errorf("%s: interval_ms must be from 0 to %d", *w.Name, longest.Milliseconds())
	case k.scheduled && w.interval() == 0:
		return fmt.Errorf("%s: %s needs an interval", *w.Name, w.Kind)
	case k.exchanges != (len(w.Exchanges) > 0):
		return fmt.Errorf("%s: exchanges are for exchange and short-connection", *w.Name)
	}
	for _, e := range w.Exchanges {
		if e.Request < exchangeHeader || e.Request > maxMessage {
			return fmt.Errorf("%s: a request has %d to %d bytes", *w.Name, exchangeHeader, maxMessage)
		}
	}
	return nil
}

// readPlan takes all that r has for one plan.
func readPlan(r io.Reader) (*plan, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("plan: %w", err)
	}
	var p plan
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("plan: %w", err)
	}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("plan: %w", err)
	}
	return &p, nil
}

func (p *plan) check() error {
	switch {
	case !(p.Seconds > 0 && p.Seconds <= longest.Seconds()):
		return fmt.Errorf("seconds must be above 0 and at most %v", longest.Seconds())
	case p.Target == "":
		return errors.New("no target")
	case p.Workloads == nil:
		return errors.New("no workloads")
	}
	for _, w := range p.Workloads {
		if err := w.check(); err != nil {
			return fmt.Errorf("workload %w", err)
		}
	}
	return nil
}

func setupLoad(*flag.FlagSet) func(*dialer) error {
	return func(d *dialer) error {
		p, err := readPlan(os.Stdin)
		if err != nil {
			return err
		}
		return p.carryOut(os.Stdout, d.dialUnlimited)
	}
}

// link is a connection as a session needs it.
type link interface {
	io.ReadWriteCloser
	// cut ends it at once, and what reads and writes it.
	cut()
}

// unlimitedConn waits for the tunnel as long as the run does: what does not come
// is overdue and no error. It also does without the goroutine that conn needs for
// every read and every write.
type unlimitedConn struct{ *conn }

func (c unlimitedConn) Read(p []byte) (int, error)  { return c.inner.Read(p) }
func (c unlimitedConn) Write(p []byte) (int, error) { return c.inner.Write(p) }
func (c unlimitedConn) cut()                        { c.conn.cut() }

func (d *dialer) dialUnlimited(target string) (link, error) {
	to := *d
	to.target = target
	c, err := to.dial()
	if err != nil {
		return nil, err
	}
	return unlimitedConn{c}, nil
}

// loadRun is a plan while it is carried out.
type loadRun struct {
	dialTo func(target string) (link, error)
	out    *samples
	// over is closed at the end.
	over chan struct{}
	// settling counts the staying sessions that are not connected yet.
	settling atomic.Int64

	mu sync.Mutex
	// waiting has everything that will be overdue at the end.
	waiting map[*unanswered]struct{}
}

// workload is one workload of a run.
type workload struct {
	*loadRun
	place    int
	plan     workloadPlan
	target   string
	dialing  chan struct{}
	underWay chan struct{}
}

// carryOut writes the samples to w. When the time is over it returns at once and
// leaves the sessions to themselves.
func (p *plan) carryOut(w io.Writer, dialTo func(target string) (link, error)) error {
	out, err := newSamples(w, len(p.Workloads))
	if err != nil {
		return err
	}
	r := &loadRun{
		dialTo:  dialTo,
		out:     out,
		over:    make(chan struct{}),
		waiting: map[*unanswered]struct{}{},
	}
	end := time.NewTimer(time.Duration(p.Seconds * float64(time.Second)))
	defer end.Stop()
	r.begin(p)
	select {
	case err := <-out.broken():
		close(r.over)
		return err
	case <-end.C:
	}
	close(r.over)
	r.giveUp(time.Now())
	return out.finish()
}

// begin starts all sessions at the same time.
func (r *loadRun) begin(p *plan) {
	// One more than there are, so that ready waits for the last to be counted.
	r.settling.Store(1)
	for place, plan := range p.Workloads {
		w := &workload{
			loadRun: r, place: place, plan: plan, target: cmp.Or(plan.Target, p.Target),
			dialing:  make(chan struct{}, dialsAtOnce),
			underWay: make(chan struct{}, dialsUnderWay),
		}
		k := kinds[plan.Kind]
		if k.stays {
			r.settling.Add(int64(plan.Sessions))
		}
		for i := range int(plan.Sessions) {
			go k.run(&session{workload: w, index: i})
		}
	}
	r.settle()
}

// settle counts a session that is connected, or has failed to.
func (r *loadRun) settle() {
	if r.settling.Add(-1) == 0 {
		r.out.ready()
	}
}

// giveUp reports everything that has not been answered.
func (r *loadRun) giveUp(now time.Time) {
	r.mu.Lock()
	waiting := r.waiting
	r.waiting = nil
	r.mu.Unlock()
	for u := range waiting {
		u.giveUp(now)
	}
}

func (w *workload) dial() (link, error) { return w.dialTo(w.target) }

// turn waits for its turn to dial, and gives the dial.
func (w *workload) turn() func() (link, error) {
	select {
	case w.dialing <- struct{}{}:
	case <-w.over:
	}
	return func() (link, error) {
		defer func() {
			select {
			case <-w.dialing:
			case <-w.over:
			}
		}()
		return w.dial()
	}
}

// unanswered is what one connection still waits for: the messages of a schedule,
// or one transfer.
type unanswered struct {
	w *workload

	mu   sync.Mutex
	from []time.Time
	// next is when the first message is due that is not in from. A writer that is
	// held up comes too late for it, and it may be overdue all the same.
	next     time.Time
	interval time.Duration
	closed   bool
	// gap is the session's after a cut, if it was cut; an answer ends it.
	gap *unanswered
}

// awaitOne waits for the one answer to what counts from then.
func (w *workload) awaitOne(from time.Time) *unanswered {
	return w.await(&unanswered{w: w, from: []time.Time{from}})
}

// awaitAll waits for the answers to a schedule.
func (w *workload) awaitAll(begin time.Time) *unanswered {
	return w.await(&unanswered{w: w, next: begin, interval: w.plan.interval()})
}

func (w *workload) await(u *unanswered) *unanswered {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting != nil {
		w.waiting[u] = struct{}{}
	}
	return u
}

// sent adds the schedule's next message.
func (u *unanswered) sent(from time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.from = append(u.from, from)
	u.next = u.next.Add(u.interval)
}

// oldest takes the oldest without an answer, sent or only due; now if there is none.
func (u *unanswered) oldest(now time.Time) time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	oldest := now
	switch {
	case len(u.from) > 0:
		oldest, u.from = u.from[0], u.from[1:]
	case u.interval > 0 && u.next.Before(now):
		oldest, u.next = u.next, u.next.Add(u.interval)
	}
	return oldest
}

// answered takes the oldest; it is false if there is none.
func (u *unanswered) answered(now time.Time) bool {
	if u.gap != nil {
		u.gap.answered(now)
		u.gap.forget()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return true
	}
	if len(u.from) == 0 {
		return false
	}
	u.w.out.latency(u.w.place, u.from[0], now)
	u.from = u.from[1:]
	return true
}

// giveUp reports everything that waits now, sent or only due, as overdue.
func (u *unanswered) giveUp(now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return
	}
	u.closed = true
	for _, from := range u.from {
		u.w.out.overdue(u.w.place, from, now)
	}
	if u.interval > 0 {
		for ; u.next.Before(now); u.next = u.next.Add(u.interval) {
			u.w.out.overdue(u.w.place, u.next, now)
		}
	}
}

// isClosed reports whether the wait is over.
func (u *unanswered) isClosed() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.closed
}

// forget ends the wait silently; it is false if it had ended before.
func (u *unanswered) forget() bool {
	u.w.mu.Lock()
	delete(u.w.waiting, u)
	u.w.mu.Unlock()
	u.mu.Lock()
	defer u.mu.Unlock()
	wasOpen := !u.closed
	u.closed = true
	return wasOpen
}
