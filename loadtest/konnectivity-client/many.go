package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"
)

func setupDials(fs *flag.FlagSet) func(*dialer) error {
	count := fs.Int("count", 100, "`number` of connections")
	concurrency := fs.Int("concurrency", 1, "connections at the same time")
	touch := fs.Bool("touch", false, "send one byte on each connection and read it back")
	return func(d *dialer) error {
		err := errors.Join(atLeast("count", *count, 1), atLeast("concurrency", *concurrency, 1))
		if err != nil {
			return err
		}
		var (
			mu          sync.Mutex
			latencies   []time.Duration
			errs        = map[string]int{}
			closeErrors = map[string]int{}
			failed      int
		)
		work := make(chan struct{})
		var workers sync.WaitGroup
		start := time.Now()
		for range *concurrency {
			workers.Add(1)
			go func() {
				defer workers.Done()
				for range work {
					latency, err, closeErr := d.once(*touch)
					mu.Lock()
					if err != nil {
						failed++
						errs[err.Error()]++
					} else {
						latencies = append(latencies, latency)
					}
					if closeErr != nil {
						closeErrors[closeErr.Error()]++
					}
					mu.Unlock()
				}
			}()
		}
		for range *count {
			work <- struct{}{}
		}
		close(work)
		workers.Wait()
		seconds := time.Since(start).Seconds()

		slices.Sort(latencies)
		printJSON(struct {
			Rate        float64        `json:"dials_per_second"`
			OK          int            `json:"ok"`
			Failed      int            `json:"failed"`
			Errors      map[string]int `json:"errors"`
			CloseErrors map[string]int `json:"close_errors"`
			P50         float64        `json:"p50_ms"`
			P99         float64        `json:"p99_ms"`
		}{
			float64(len(latencies)) / seconds, len(latencies), failed, errs, closeErrors,
			quantile(latencies, 0.50), quantile(latencies, 0.99),
		})
		if failed > 0 {
			return errQuietFailure
		}
		return nil
	}
}

// once opens one connection and closes it. The latency is that of the dial,
// with the touch if there is one.
func (d *dialer) once(touch bool) (latency time.Duration, err, closeErr error) {
	start := time.Now()
	c, err := d.dial()
	if err != nil {
		return 0, err, nil
	}
	if touch {
		err = c.touch()
	}
	latency = time.Since(start)
	return latency, err, c.Close()
}

func setupBanner(fs *flag.FlagSet) func(*dialer) error {
	count := fs.Int("count", 100, "`number` of connections, one after another")
	expect := fs.String("expect", "", "the right first line, without its newline")
	return func(d *dialer) error {
		if err := atLeast("count", *count, 1); err != nil {
			return err
		}
		result := struct {
			Right       int            `json:"right"`
			Wrong       int            `json:"wrong"`
			Errors      map[string]int `json:"errors"`
			CloseErrors map[string]int `json:"close_errors"`
		}{Errors: map[string]int{}, CloseErrors: map[string]int{}}
		for range *count {
			line, err, closeErr := d.firstLine()
			switch {
			case err != nil:
				result.Errors[err.Error()]++
			case line == *expect:
				result.Right++
			default:
				result.Wrong++
			}
			if closeErr != nil {
				result.CloseErrors[closeErr.Error()]++
			}
		}
		printJSON(result)
		if result.Right != *count {
			return errQuietFailure
		}
		return nil
	}
}

func (d *dialer) firstLine() (line string, err, closeErr error) {
	c, err := d.dial()
	if err != nil {
		return "", err, nil
	}
	line, err = readLine(c)
	return line, err, c.Close()
}

func setupHold(fs *flag.FlagSet) func(*dialer) error {
	count := fs.Int("count", 1, "`number` of connections")
	return func(d *dialer) error {
		if err := atLeast("count", *count, 1); err != nil {
			return err
		}
		held := make([]*conn, 0, *count)
		for i := range *count {
			c, err := d.dial()
			if err != nil {
				return err
			}
			if err := c.touch(); err != nil {
				return fmt.Errorf("connection %d: %w", i+1, err)
			}
			held = append(held, c)
		}
		printJSON(struct {
			Held int `json:"held"`
		}{len(held)})
		if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
			return fmt.Errorf("stdin: %w", err)
		}
		return nil
	}
}
