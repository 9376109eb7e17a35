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
	total, chunk, seed := sendFlags(fs)
	return func(d *dialer) error {
		if err := checkSend(*total, *chunk); err != nil {
			return err
		}
		c, err := d.dial()
		if err != nil {
			return err
		}
		start := time.Now()
		type sent struct {
			sum string
			err error
		}
		done := make(chan sent, 1)
		go func() {
			sum, err := send(c, *total, *chunk, *seed)
			done <- sent{sum, err}
		}()
		n, received, readErr := receive(c, *total)
		if readErr != nil {
			// Nothing will drain the echo any more; the writer must not wait for it.
			c.cut()
		}
		s := <-done
		seconds := time.Since(start).Seconds()
		closed := c.timedClose()
		if readErr != nil || s.err != nil {
			return fmt.Errorf("echo: %d of %d bytes came back: read error %q, write error %q",
				n, *total, errorText(readErr), errorText(s.err))
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
	}
}

func setupUpload(fs *flag.FlagSet) func(*dialer) error {
	total, chunk, seed := sendFlags(fs)
	readAnswer := fs.Bool("read-answer", false, "read one line before closing")
	return func(d *dialer) error {
		if err := checkSend(*total, *chunk); err != nil {
			return err
		}
		c, err := d.dial()
		if err != nil {
			return err
		}
		start := time.Now()
		sum, err := send(c, *total, *chunk, *seed)
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		answer := ""
		if *readAnswer {
			if answer, err = readLine(c); err != nil {
				return fmt.Errorf("answer: %w (after %q)", err, answer)
			}
		}
		seconds := time.Since(start).Seconds()
		closed := c.timedClose()
		printJSON(struct {
			Sum     string  `json:"sha256"`
			Bytes   int64   `json:"bytes"`
			Seconds float64 `json:"seconds"`
			Mbit    float64 `json:"mbit"`
			Answer  string  `json:"answer,omitempty"`
			closing
		}{sum, *total, seconds, mbit(*total, seconds), answer, closed})
		return nil
	}
}

func setupDownload(fs *flag.FlagSet) func(*dialer) error {
	total := fs.Int64("bytes", 0, "`number` of bytes to read; 0 reads to the end")
	request := requestFlag(fs)
	return func(d *dialer) error {
		if err := atLeast("bytes", *total, 0); err != nil {
			return err
		}
		c, err := d.dial()
		if err != nil {
			return err
		}
		start := time.Now()
		if err := c.request(*request); err != nil {
			return err
		}
		n, sum, err := receive(c, *total)
		seconds := time.Since(start).Seconds()
		eof := errors.Is(err, io.EOF)
		if err != nil && !eof {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
		closed := c.timedClose()
		printJSON(struct {
			Sum     string  `json:"sha256"`
			Bytes   int64   `json:"bytes"`
			Seconds float64 `json:"seconds"`
			Mbit    float64 `json:"mbit"`
			EOF     bool    `json:"eof"`
			closing
		}{sum, n, seconds, mbit(n, seconds), eof, closed})
		return nil
	}
}

func setupSlowClose(fs *flag.FlagSet) func(*dialer) error {
	total := fs.Int64("bytes", 1, "`number` of bytes to read before closing")
	request := requestFlag(fs)
	return func(d *dialer) error {
		if err := atLeast("bytes", *total, 1); err != nil {
			return err
		}
		c, err := d.dial()
		if err != nil {
			return err
		}
		if err := c.request(*request); err != nil {
			return err
		}
		if n, _, err := receive(c, *total); err != nil {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
		printJSON(c.timedClose())
		return nil
	}
}

func setupCut(fs *flag.FlagSet) func(*dialer) error {
	request := requestFlag(fs)
	return func(d *dialer) error {
		c, err := d.dial()
		if err != nil {
			return err
		}
		if err := c.request(*request); err != nil {
			return err
		}
		fmt.Fprintln(os.Stderr, "connected")
		n, _, readErr := receive(c, 0)
		closed := c.timedClose()
		printJSON(struct {
			Bytes     int64  `json:"bytes"`
			ReadError string `json:"read_error"`
			closing
		}{n, errorText(readErr), closed})
		return nil
	}
}

func sendFlags(fs *flag.FlagSet) (total *int64, chunk *int, seed *uint64) {
	total = fs.Int64("bytes", 1<<20, "`number` of bytes to send")
	chunk = fs.Int("chunk", 32<<10, "bytes per write")
	seed = fs.Uint64("seed", 1, "seed of the pseudo-random bytes")
	return total, chunk, seed
}

func checkSend(total int64, chunk int) error {
	return errors.Join(atLeast("bytes", total, 1), atLeast("chunk", chunk, 1))
}

func requestFlag(fs *flag.FlagSet) *string {
	return fs.String("request", "", "`text` to send first, as a line")
}

// readLine reads up to the first newline and returns the line without its end.
func readLine(r io.Reader) (string, error) {
	line, err := bufio.NewReader(r).ReadString('\n')
	return strings.TrimRight(line, "\r\n"), err
}
