package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
	"io"
	"math/rand/v2"
)

const (
	readSize = 64 << 10
	ringSize = 8
)

// ring moves buffers between the goroutine that does I/O and the one that
// makes or hashes the bytes, so that hashing does not slow the transfer.
type ring struct {
	free, full chan []byte
	stop       chan struct{}
	sum        chan string
}

func newRing(size int) *ring {
	r := &ring{
		free: make(chan []byte, ringSize),
		full: make(chan []byte, ringSize),
		stop: make(chan struct{}),
		sum:  make(chan string, 1),
	}
	for range ringSize {
		r.free <- make([]byte, size)
	}
	return r
}

// send writes total pseudo-random bytes to w in pieces of chunk bytes and
// returns their SHA-256.
func send(w io.Writer, total int64, chunk int, seed uint64) (string, error) {
	r := newRing(chunk)
	defer close(r.stop)
	go r.produce(total, seed)
	for b := range r.full {
		if _, err := w.Write(b); err != nil {
			return "", err
		}
		r.free <- b[:cap(b)]
	}
	return <-r.sum, nil
}

func (r *ring) produce(total int64, seed uint64) {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	random := rand.NewChaCha8(key)
	h := sha256.New()
	for total > 0 {
		var b []byte
		select {
		case b = <-r.free:
		case <-r.stop:
			return
		}
		b = b[:min(int64(len(b)), total)]
		// Neither of the two ever returns an error.
		_, _ = random.Read(b)
		_, _ = h.Write(b)
		total -= int64(len(b))
		r.full <- b
	}
	r.sum <- hexSum(h)
	close(r.full)
}

// receive reads from rd until limit bytes have come, or without a limit (0)
// until an error. It returns the count and the SHA-256 of what it read; err is
// nil only if the limit was reached.
func receive(rd io.Reader, limit int64) (n int64, sum string, err error) {
	r := newRing(readSize)
	go r.consume()
	for err == nil && (limit == 0 || n < limit) {
		b := <-r.free
		if limit > 0 {
			b = b[:min(int64(len(b)), limit-n)]
		}
		var got int
		got, err = rd.Read(b)
		n += int64(got)
		r.full <- b[:got]
	}
	close(r.full)
	return n, <-r.sum, err
}

func (r *ring) consume() {
	h := sha256.New()
	for b := range r.full {
		_, _ = h.Write(b)
		r.free <- b[:cap(b)]
	}
	r.sum <- hexSum(h)
}

func hexSum(h hash.Hash) string {
	return hex.EncodeToString(h.Sum(nil))
}

// mbit is a rate in 10^6 bits per second.
func mbit(bytes int64, seconds float64) float64 {
	if seconds <= 0 {
		return 0
	}
	return float64(bytes) * 8 / 1e6 / seconds
}
