package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

// grpcTimeout is what kube-apiserver gives the gRPC connection.
const grpcTimeout = 30 * time.Second

// closeGrace is added to the library's own close timeout, so that the library
// always gets to give its own answer.
const closeGrace = 10 * time.Second

// dialer opens connections to one target through one server.
type dialer struct {
	uds     string
	target  string
	timeout time.Duration
}

func (d *dialer) check(rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unexpected argument %q", rest[0])
	case d.uds == "":
		return errors.New("--uds is required")
	case d.timeout <= 0:
		return errors.New("--timeout must be positive")
	}
	return nil
}

// dial creates a single-use tunnel and dials the target through it. All its
// errors are a dialError.
func (d *dialer) dial() (*conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d.timeout)
	defer cancel()
	// The tunnel outlives the dial, so it must not inherit the dial's context.
	tunnelCtx, cut := context.WithCancel(context.Background())

	// WithBlock, WithReturnConnectionError and WithTimeout are deprecated, but
	// they are what kube-apiserver's egress selector passes.
	tunnel, err := client.CreateSingleUseGrpcTunnelWithContext(ctx, tunnelCtx, d.uds,
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			return net.Dial("unix", d.uds)
		}),
		grpc.WithBlock(),
		grpc.WithReturnConnectionError(),
		grpc.WithTimeout(grpcTimeout),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		cut()
		return nil, dialError{fmt.Errorf("tunnel: %w", err)}
	}
	inner, err := tunnel.DialContext(ctx, "tcp", d.target)
	if err != nil {
		// A tunnel is good for one dial. After a timed-out dial the library is
		// still sending its DIAL_CLS, so let it close the tunnel by itself.
		go func() {
			select {
			case <-tunnel.Done():
			case <-time.After(closeGrace):
			}
			cut()
		}()
		return nil, dialError{err}
	}
	return &conn{inner: inner, cut: cut, timeout: d.timeout}, nil
}

// conn adds time limits to the library's connection, which implements no
// deadlines and whose Read can block for ever once the tunnel is gone.
// One goroutine may read while another writes.
type conn struct {
	inner   net.Conn
	cut     context.CancelFunc
	timeout time.Duration
}

type ioResult struct {
	n   int
	err error
}

func (c *conn) Read(p []byte) (int, error) {
	return c.limited("read", c.timeout, func() (int, error) { return c.inner.Read(p) })
}

func (c *conn) Write(p []byte) (int, error) {
	return c.limited("write", c.timeout, func() (int, error) { return c.inner.Write(p) })
}

// Close closes the connection and frees what belongs to it.
func (c *conn) Close() error {
	defer c.cut()
	op := func() (int, error) { return 0, c.inner.Close() }
	_, err := c.limited("close", client.CloseTimeout+closeGrace, op)
	return err
}

// timedClose is Close with the time it took.
func (c *conn) timedClose() closing {
	start := time.Now()
	err := c.Close()
	return closing{Error: errorText(err), Seconds: time.Since(start).Seconds()}
}

// limited runs op; if it takes too long it cuts the tunnel and abandons op.
func (c *conn) limited(what string, limit time.Duration, op func() (int, error)) (int, error) {
	done := make(chan ioResult, 1)
	go func() {
		n, err := op()
		done <- ioResult{n, err}
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.n, r.err
	case <-timer.C:
		c.cut()
		return 0, fmt.Errorf("%s: nothing happened in %v", what, limit)
	}
}

// touch sends one byte and waits for it to come back.
func (c *conn) touch() error {
	b := []byte{'t'}
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("touch: %w", err)
	}
	n, err := c.Read(b)
	switch {
	case err != nil:
		return fmt.Errorf("touch: %w", err)
	case n != 1 || b[0] != 't':
		return fmt.Errorf("touch: got %q back", b[:n])
	}
	return nil
}

// request sends text as a line, unless it is empty.
func (c *conn) request(text string) error {
	if text == "" {
		return nil
	}
	if _, err := c.Write([]byte(text + "\n")); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	return nil
}

// closing is the part of a result about Close.
type closing struct {
	Error   string  `json:"close_error"`
	Seconds float64 `json:"close_seconds"`
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
