package main

import (
	"io"
	"math/rand/v2"
	"time"
)

// fetch and the sessions below dial again and again.
func (s *session) fetch() {
	command := number([]byte{wantFetch}, s.plan.Size)
	s.again(s.turn, func(c link) error {
		if err := writeTo(c, command); err != nil {
			return err
		}
		return readZerosOf(s.counted(c), s.plan.Size)
	})
}

func (s *session) send() {
	s.again(s.turn, func(c link) error {
		if err := s.writeWhole(c, wantReceipt); err != nil {
			return err
		}
		return readAll(c, make([]byte, 1))
	})
}

func (s *session) writeClose() {
	s.again(s.turn, func(c link) error { return s.writeWhole(c, wantWhole) })
}

// greeting is for a target that speaks first, and always says the same.
func (s *session) greeting() {
	s.again(s.turn, func(c link) error {
		line, err := readLine(c)
		if err == nil && line != greetingLine {
			err = errContent
		}
		return err
	})
}

// abandon closes in the middle of an endless stream.
func (s *session) abandon() {
	s.again(s.turn, func(c link) error {
		if err := writeTo(c, []byte{wantZeros}); err != nil {
			return err
		}
		_, err := io.CopyN(io.Discard, s.counted(c), int64(s.plan.Size))
		return err
	})
}

// writeWhole says how much comes, and writes it.
func (s *session) writeWhole(c link, command byte) error {
	if err := writeTo(c, number([]byte{command}, s.plan.Size)); err != nil {
		return err
	}
	for left := s.plan.Size; left > 0; {
		n := min(left, chunkSize)
		if err := writeTo(c, zeros[:n]); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

func (s *session) dials() { s.dialEach(s.touch) }

// dialEach talks on a new connection whenever one is due, or on one after another.
func (s *session) dialEach(talk func(link) error) {
	if s.plan.interval() > 0 {
		s.dialsDue(talk)
		return
	}
	// As many sessions as there are is as many dials as there should be.
	s.again(func() func() (link, error) { return s.dial }, talk)
}

// dialsDue dials whenever it is time to, whatever the earlier dials do.
func (s *session) dialsDue(talk func(link) error) {
	begin := s.begin(s.out.start)
	for k := 0; ; k++ {
		from, ok := whenDue(begin.Add(time.Duration(k)*s.plan.interval()), s.over)
		if !ok {
			return
		}
		select {
		case s.underWay <- struct{}{}:
			go func() {
				s.once(from, s.dial, talk)
				<-s.underWay
			}()
		default:
			s.out.failed(s.place, errTooMany)
		}
	}
}

// touch sends the dial's bytes, if it has any, and reads them back.
func (s *session) touch(c link) error {
	if s.plan.Size == 0 {
		return nil
	}
	first := rand.Uint64()
	sent := make([]byte, 1+s.plan.Size)
	sent[0] = wantEcho
	fillPing(sent[1:], first)
	written := make(chan error, 1)
	go func() {
		// The target sends back before it has everything.
		err := writeTo(c, sent)
		if err != nil {
			c.cut()
		}
		written <- err
	}()
	got := make([]byte, s.plan.Size)
	if err := readAll(c, got); err != nil {
		return err
	}
	if !isPing(got, first) {
		return errContent
	}
	return <-written
}

// again does the same on one connection after another. The interval, if there is
// one, is between their dials.
func (s *session) again(turn func() func() (link, error), talk func(link) error) {
	for {
		dial := turn()
		from := time.Now()
		rest := s.plan.interval()
		if !s.once(from, dial, talk) {
			rest = max(rest, time.Since(from)+redialPause)
		}
		if _, ok := whenDue(from.Add(rest), s.over); !ok {
			return
		}
	}
}

// once dials, talks, and closes. Its time counts from its start until it has
// talked.
func (s *session) once(from time.Time, dial func() (link, error), talk func(link) error) bool {
	u := s.awaitOne(from)
	c, err := dial()
	if err == nil {
		if err = talk(c); err != nil {
			c.cut()
		}
	}
	if err != nil {
		if u.forget() {
			s.out.failed(s.place, err)
		}
		return false
	}
	u.answered(time.Now())
	u.forget()
	// The result of the close means nothing: after the last byte the library gives
	// an error or none by chance.
	_ = c.Close()
	return true
}
