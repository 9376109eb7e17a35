// Package conformance holds conformance tests of others for Culvert: of the Go project for
// connections, and h2spec for HTTP/2.
package conformance

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"testing"

	"golang.org/x/net/nettest"
)

// TestConnect checks that a connection through a frontend for HTTP CONNECT behaves as net.Conn
// demands. CULVERT_UDS is the frontend's socket.
func TestConnect(t *testing.T) {
	frontend := os.Getenv("CULVERT_UDS")
	if frontend == "" {
		t.Skip("CULVERT_UDS is not set")
	}
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		return pipe(frontend)
	})
}

// pipe makes a connection through the frontend: its client's end, and its target's.
func pipe(frontend string) (net.Conn, net.Conn, func(), error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, nil, err
	}
	defer listener.Close()
	client, err := connect(frontend, listener.Addr().String())
	if err != nil {
		return nil, nil, nil, err
	}
	target, err := listener.Accept()
	if err != nil {
		client.Close()
		return nil, nil, nil, err
	}
	stop := func() {
		client.Close()
		target.Close()
	}
	return client, target, stop, nil
}

// connect asks the frontend for a connection to the target.
func connect(frontend, target string) (net.Conn, error) {
	conn, err := net.Dial("unix", frontend)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target); err != nil {
		conn.Close()
		return nil, err
	}
	// Byte by byte, because what follows the head belongs to the connection.
	head := make([]byte, 0, 128)
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		next := make([]byte, 1)
		if _, err := conn.Read(next); err != nil {
			conn.Close()
			return nil, err
		}
		head = append(head, next[0])
	}
	if !bytes.Contains(head, []byte(" 200 ")) {
		conn.Close()
		return nil, fmt.Errorf("the frontend answered %q", head)
	}
	return conn, nil
}
