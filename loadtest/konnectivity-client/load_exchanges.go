package main

import (
	"io"
	"time"
)

// exchange carries out the exchanges whenever they are due, on one connection and
// one at a time: what comes due before the last answer is complete is left out.
func (s *session) exchange() {
	s.stay([]byte{wantPadded}, func(c link) error {
		for due := s.begin(time.Now()); ; due = nextDue(due, s.plan.interval()) {
			from, ok := whenDue(due, s.over)
			if !ok {
				return nil
			}
			u := s.awaitOne(from)
			u.gap = s.gap
			if err := s.exchanges(c, nil); err != nil {
				s.wasCut(u)
				return err
			}
			u.answered(time.Now())
			u.forget()
		}
	})
}

// nextDue is the first time of a schedule after due that is not past.
func nextDue(due time.Time, interval time.Duration) time.Time {
	due = due.Add(interval)
	if late := time.Since(due); late > 0 {
		due = due.Add((late + interval - 1) / interval * interval)
	}
	return due
}

// shortConnections carries out the exchanges on one new connection after another.
func (s *session) shortConnections() {
	s.dialEach(func(c link) error { return s.exchanges(c, []byte{wantPadded}) })
}

// exchanges carries out all exchanges once, the first behind a command.
func (s *session) exchanges(c link, message []byte) error {
	r := s.counted(c)
	for _, e := range s.plan.Exchanges {
		message = number(number(message, e.Request), e.Answer)
		message = append(message, make([]byte, e.Request-exchangeHeader)...)
		if err := writeTo(c, message); err != nil {
			return err
		}
		if err := readZerosOf(r, e.Answer); err != nil {
			return err
		}
		message = message[:0]
	}
	return nil
}

// readZerosOf reads a number of zeros.
func readZerosOf(r io.Reader, size uint64) error {
	b := make([]byte, min(size, chunkSize))
	for left := size; left > 0; {
		n, err := readZeros(r, b[:min(left, chunkSize)])
		left -= uint64(n)
		if err != nil && left > 0 {
			return err
		}
	}
	return nil
}
