package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// What a session says first to the target.
const (
	wantEcho    = 'E'
	wantZeros   = 'D'
	wantSink    = 'S'
	wantFetch   = 'F'
	wantReceipt = 'R'
	wantWhole   = 'W'
	wantAnswers = 'Q'
	wantPadded  = 'X'
	wantLines   = 'T'
	wantNoise   = 'P'
	wantCheck   = 'V'
	wantHold    = 'H'
)

const (
	chunkSize = 64 << 10
	// exchangeHeader is the two numbers with which a request of an exchange begins.
	exchangeHeader = 16
	// stampSize is the time at the head of a line, and stampSlack how much the
	// time in it may be wrong: any more, and it is not one.
	stampSize  = 8
	stampSlack = time.Second

	greetingLine = "SSH-2.0-greeter"
)

var (
	zeros = make([]byte, chunkSize)

	errEnded   = errors.New("the connection ended")
	errContent = errors.New("wrong bytes came back")
	errUnasked = errors.New("the target wrote and had nothing to write")
	errNothing = errors.New("an answer came to nothing that was sent")
	errTooMany = errors.New("too many dials under way")
)

// kind is what the sessions of a workload do.
type kind struct {
	run func(*session)
	// stays is for sessions that are connected from the beginning to the end.
	stays bool
	// scheduled is for sessions that cannot be without an interval.
	scheduled bool
	// buffered is for sizes that must fit into memory.
	buffered bool
	// exchanges is for sessions that are about them, and not about a size.
	exchanges bool
	minSize   uint64
}

var kinds = map[string]kind{
	"echo":     {run: (*session).echo, stays: true, scheduled: true, buffered: true, minSize: 1},
	"download": {run: (*session).download, stays: true},
	"upload":   {run: (*session).upload, stays: true},
	// The target counts those in which it reads other bytes.
	"checked-download": {run: (*session).checkedDownload, stays: true},
	"checked-upload":   {run: (*session).checkedUpload, stays: true},
	"fetch":            {run: (*session).fetch},
	"send":             {run: (*session).send},
	// The target counts what comes short.
	"write-close":      {run: (*session).writeClose},
	"greeting":         {run: (*session).greeting},
	"abandon":          {run: (*session).abandon},
	"request":          {run: (*session).request, stays: true, scheduled: true, minSize: 1},
	"exchange":         {run: (*session).exchange, stays: true, scheduled: true, exchanges: true},
	"short-connection": {run: (*session).shortConnections, exchanges: true},
	"tail":             {run: (*session).tail, stays: true, buffered: true, minSize: stampSize},
	"dial":             {run: (*session).dials, buffered: true},
	"stall":            {run: (*session).stall, stays: true},
	"idle":             {run: (*session).idle, stays: true},
}

// session is one of a workload's sessions.
type session struct {
	*workload
	index int
	// gap is what the session waits for since it was cut, until its next connection
	// has an answer.
	gap *unanswered
}

// number is a number as the target reads it.
func number(command []byte, n uint64) []byte {
	return binary.BigEndian.AppendUint64(command, n)
}

// stay keeps a session going: whenever it breaks it says so and dials anew, until
// talk returns without an error because the run is over.
func (s *session) stay(command []byte, talk func(link) error) {
	err := s.connected(command, s.settle, talk)
	for err != nil && s.fail(err) {
		err = s.connected(command, func() {}, talk)
	}
}

// hold connects once, for a session that would not notice that it breaks.
func (s *session) hold(command byte) {
	err := s.connected([]byte{command}, s.settle, func(link) error {
		<-s.over
		return nil
	})
	if err != nil {
		s.out.failed(s.place, err)
	}
}

// connected dials, gives the command, says that this is settled, and talks.
func (s *session) connected(command []byte, settled func(), talk func(link) error) error {
	c, err := s.turn()()
	if err == nil {
		defer c.cut()
		if len(command) > 0 {
			err = writeTo(c, command)
		}
	}
	settled()
	if err != nil {
		return err
	}
	return talk(c)
}

// fail reports an error and waits until it is time to dial again; it is false if
// the run is over first.
func (s *session) fail(err error) bool {
	s.out.failed(s.place, err)
	return s.pause(redialPause)
}

// pause waits; it is false if the run is over first.
func (s *session) pause(d time.Duration) bool {
	_, ok := whenDue(time.Now().Add(d), s.over)
	return ok
}

// ended gives an end the same name wherever it is met: whether the read or the
// write meets it first is chance.
func ended(what string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errEnded
	}
	return fmt.Errorf("%s: %w", what, err)
}

func writeTo(c link, b []byte) error {
	if _, err := c.Write(b); err != nil {
		return ended("write", err)
	}
	return nil
}

func readAll(c io.Reader, b []byte) error {
	if _, err := io.ReadFull(c, b); err != nil {
		return ended("read", err)
	}
	return nil
}

// counted counts what is read.
type counted struct {
	io.Reader
	n *atomic.Uint64
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n.Add(uint64(n))
	return n, err
}

func (s *session) counted(c link) io.Reader {
	return counted{c, &s.out.read[s.place]}
}

// readZeros reads some zeros.
func readZeros(r io.Reader, b []byte) (int, error) {
	n, err := r.Read(b)
	if !bytes.Equal(b[:n], zeros[:n]) {
		return n, errContent
	}
	if err != nil {
		return n, ended("read", err)
	}
	return n, nil
}

// begin is when the session's schedule begins: those of a workload are spread
// over the interval.
func (s *session) begin(from time.Time) time.Time {
	share := float64(s.index) / float64(s.plan.Sessions)
	return from.Add(time.Duration(share * float64(s.plan.interval())))
}

// openLoop sends on the session's schedule while read takes the answers, until
// one of them fails.
func (s *session) openLoop(
	c link, message func(k uint64) []byte, read func(*unanswered) error,
) error {
	begin := s.begin(time.Now())
	u := s.awaitAll(begin)
	u.gap = s.gap
	stop := make(chan struct{})
	defer close(stop)
	failed := make(chan error, 2)
	go func() { failed <- s.sendAll(c, u, begin, stop, message) }()
	go func() { failed <- read(u) }()
	err := <-failed
	s.wasCut(u)
	return err
}

// wasCut ends the wait of a connection. The oldest request goes on waiting, until the
// first answer on the next connection.
func (s *session) wasCut(u *unanswered) {
	now := time.Now()
	if s.gap == nil || s.gap.isClosed() {
		s.gap = s.awaitOne(u.oldest(now))
	}
	u.giveUp(now)
	u.forget()
}

// sendAll sends each message when it is due, and waits for nothing but the write.
func (s *session) sendAll(
	c link, u *unanswered, begin time.Time, stop <-chan struct{}, message func(k uint64) []byte,
) error {
	for k := uint64(0); ; k++ {
		from, ok := whenDue(begin.Add(time.Duration(k)*s.plan.interval()), stop)
		if !ok {
			return nil
		}
		u.sent(from)
		if err := writeTo(c, message(k)); err != nil {
			return err
		}
	}
}

func (s *session) echo() {
	s.stay([]byte{wantEcho}, func(c link) error {
		// No two connections send the same, so that none can get another's answer
		// unnoticed.
		first := rand.Uint64()
		sent, got := make([]byte, s.plan.Size), make([]byte, s.plan.Size)
		return s.openLoop(c, func(k uint64) []byte {
			fillPing(sent, first+k)
			return sent
		}, func(u *unanswered) error {
			for k := first; ; k++ {
				if err := readAll(c, got); err != nil {
					return err
				}
				now := time.Now()
				if !isPing(got, k) {
					return errContent
				}
				if !u.answered(now) {
					return errNothing
				}
			}
		})
	})
}

func (s *session) request() {
	request := number(nil, s.plan.Size)
	s.stay([]byte{wantAnswers}, func(c link) error {
		return s.openLoop(c, func(uint64) []byte { return request }, func(u *unanswered) error {
			return s.readAnswers(s.counted(c), u)
		})
	})
}

// readAnswers reads one answer after the other; a read may end anywhere in one.
func (s *session) readAnswers(r io.Reader, u *unanswered) error {
	b := make([]byte, chunkSize)
	left := s.plan.Size
	for {
		n, err := readZeros(r, b)
		now := time.Now()
		for got := uint64(n); got >= left; left = s.plan.Size {
			got -= left
			n = int(got)
			if !u.answered(now) {
				return errNothing
			}
		}
		left -= uint64(n)
		if err != nil {
			return err
		}
	}
}

func (s *session) tail() {
	interval := uint64(s.plan.interval() / time.Microsecond)
	s.stay(number(number([]byte{wantLines}, s.plan.Size), interval), func(c link) error {
		r := bufio.NewReaderSize(s.counted(c), chunkSize)
		line := make([]byte, s.plan.Size)
		// Nothing can have been written before the connection was there.
		earliest := time.Now()
		for {
			if err := readAll(r, line); err != nil {
				return err
			}
			now := time.Now()
			age := time.Duration(now.UnixNano() - int64(binary.BigEndian.Uint64(line)))
			if age < -stampSlack || age > now.Sub(earliest)+stampSlack {
				return errContent
			}
			s.out.latency(s.place, now.Add(-max(age, 0)), now)
		}
	})
}

func (s *session) download() {
	s.stay([]byte{wantZeros}, func(c link) error {
		r := s.counted(c)
		b := make([]byte, chunkSize)
		for {
			if _, err := readZeros(r, b); err != nil {
				return err
			}
		}
	})
}

func (s *session) upload() {
	s.stay([]byte{wantSink}, func(c link) error {
		for {
			if err := writeTo(c, zeros); err != nil {
				return err
			}
		}
	})
}

func (s *session) checkedDownload() {
	s.stay(nil, func(c link) error {
		n := noise{seed: rand.Uint64()}
		if err := writeTo(c, number([]byte{wantNoise}, n.seed)); err != nil {
			return err
		}
		r := s.counted(c)
		got, want := make([]byte, chunkSize), make([]byte, chunkSize)
		for {
			k, err := r.Read(got)
			n.fill(want[:k])
			if !bytes.Equal(got[:k], want[:k]) {
				return errContent
			}
			if err != nil {
				return ended("read", err)
			}
		}
	})
}

func (s *session) checkedUpload() {
	s.stay(nil, func(c link) error {
		n := noise{seed: rand.Uint64()}
		failed := make(chan error, 2)
		go func() { failed <- uploadNoise(c, n) }()
		go func() {
			// The target ends the connection at the first byte that is wrong.
			err := readAll(c, make([]byte, 1))
			if err == nil {
				err = errUnasked
			}
			failed <- err
		}()
		return <-failed
	})
}

func uploadNoise(c link, n noise) error {
	if err := writeTo(c, number([]byte{wantCheck}, n.seed)); err != nil {
		return err
	}
	b := make([]byte, chunkSize)
	for {
		n.fill(b)
		if err := writeTo(c, b); err != nil {
			return err
		}
	}
}

func (s *session) stall() { s.hold(wantZeros) }

func (s *session) idle() { s.hold(wantHold) }
