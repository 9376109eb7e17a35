package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

func setupEcho(fs *flag.FlagSet) func(*dialer) error {
	up := sendFlags(fs)
	return onConn(up.check, func(c *conn) error {
		start := time.Now()
		type sent struct {
			sum string
			err error
		}
		done := make(chan sent, 1)
		go func() {
			sum, err := up.send(c)
			done <- sent{sum, err}
		}()
		n, received, readErr := receive(c, *up.total)
		if readErr != nil {
			// Nothing will drain the echo any more; the writer must not wait for it.
			c.cut()
		}
		s := <-done
		seconds := time.Since(start).Seconds()
		closed := c.timedClose()
		if readErr != nil || s.err != nil {
			return fmt.Errorf("echo: %d of %d bytes came back: read error %q, write error %q",
				n, *up.total, errorText(readErr), errorText(s.err))
		}
		printJSON(struct {
			Sent     string  `json:"sent_sha256"`
			Received string  `json:"received_sha256"`
			Bytes    int64   `json:"bytes"`
			Seconds  float64 `json:"seconds"`
			closing
		}{s.sum, received, n, seconds, closed})
		if s.sum != received {
			return errors.New("what came back is not what was sent")
		}
		return nil
	})
}

func setupUpload(fs *flag.FlagSet) func(*dialer) error {
	up := sendFlags(fs)
	readAnswer := fs.Bool("read-answer", false, "read one line before closing")
	return onConn(up.check, func(c *conn) error {
		start := time.Now()
		sum, err := up.send(c)
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		answer := ""
		if *readAnswer {
			if answer, err = readLine(c); err != nil {
				return fmt.Errorf("answer: %w (after %q)", err, answer)
			}
		}
		done := transferredSince(start, *up.total, sum)
		closed := c.timedClose()
		printJSON(struct {
			transferred
			Answer string `json:"answer,omitempty"`
			closing
		}{done, answer, closed})
		return nil
	})
}

func setupDownload(fs *flag.FlagSet) func(*dialer) error {
	total := fs.Int64("bytes", 0, "`number` of bytes to read; 0 reads to the end")
	check := func() error { return atLeast("bytes", *total, 0) }
	return onRequest(fs, check, func(c *conn, start time.Time) error {
		n, sum, err := receive(c, *total)
		done := transferredSince(start, n, sum)
		eof := errors.Is(err, io.EOF)
		if err != nil && !eof {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
		closed := c.timedClose()
		printJSON(struct {
			transferred
			EOF bool `json:"eof"`
			closing
		}{done, eof, closed})
		return nil
	})
}

func setupSlowClose(fs *flag.FlagSet) func(*dialer) error {
	total := fs.Int64("bytes", 1, "`number` of bytes to read before closing")
	check := func() error { return atLeast("bytes", *total, 1) }
	return onRequest(fs, check, func(c *conn, _ time.Time) error {
		if n, _, err := receive(c, *total); err != nil {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
		printJSON(c.timedClose())
		return nil
	})
}

func setupCut(fs *flag.FlagSet) func(*dialer) error {
	check := func() error { return nil }
	return onRequest(fs, check, func(c *conn, _ time.Time) error {
		fmt.Fprintln(os.Stderr, "connected")
		n, _, readErr := receive(c, 0)
		closed := c.timedClose()
		printJSON(struct {
			Bytes     int64  `json:"bytes"`
			ReadError string `json:"read_error"`
			closing
		}{n, errorText(readErr), closed})
		return nil
	})
}

// onConn checks the flags, dials the target, and runs a command on the connection.
func onConn(check func() error, run func(*conn) error) func(*dialer) error {
	return func(d *dialer) error {
		if err := check(); err != nil {
			return err
		}
		c, err := d.dial()
		if err != nil {
			return err
		}
		return run(c)
	}
}

// onRequest is onConn for a command that sends the line of --request first. The
// command also gets the time before that.
func onRequest(
	fs *flag.FlagSet, check func() error, run func(*conn, time.Time) error,
) func(*dialer) error {
	request := fs.String("request", "", "`text` to send first, as a line")
	return onConn(check, func(c *conn) error {
		start := time.Now()
		if err := c.request(*request); err != nil {
			return err
		}
		return run(c, start)
	})
}

// sending holds the flags of a command that sends pseudo-random bytes.
type sending struct {
	total *int64
	chunk *int
	seed  *uint64
}

func sendFlags(fs *flag.FlagSet) sending {
	return sending{
		total: fs.Int64("bytes", 1<<20, "`number` of bytes to send"),
		chunk: fs.Int("chunk", 32<<10, "bytes per write"),
		seed:  fs.Uint64("seed", 1, "seed of the pseudo-random bytes"),
	}
}

func (s sending) check() error {
	return errors.Join(atLeast("bytes", *s.total, 1), atLeast("chunk", *s.chunk, 1))
}

// send writes the bytes and returns their checksum.
func (s sending) send(w io.Writer) (string, error) {
	return send(w, *s.total, *s.chunk, *s.seed)
}

// transferred is the part of a result about bytes in one direction.
type transferred struct {
	Sum     string  `json:"sha256"`
	Bytes   int64   `json:"bytes"`
	Seconds float64 `json:"seconds"`
	Mbit    float64 `json:"mbit"`
}

func transferredSince(start time.Time, bytes int64, sum string) transferred {
	seconds := time.Since(start).Seconds()
	return transferred{sum, bytes, seconds, mbit(bytes, seconds)}
}

// readLine reads up to the first newline and returns the line without its end.
func readLine(r io.Reader) (string, error) {
	line, err := bufio.NewReader(r).ReadString('\n')
	return strings.TrimRight(line, "\r\n"), err
}
