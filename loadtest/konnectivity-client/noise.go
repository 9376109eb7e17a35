package main

import "encoding/binary"

// noise is the pseudo-random bytes of a seed, which the target knows too: the words
// of SplitMix64, big-endian. A byte that is lost or doubled shifts all that follow.
type noise struct {
	seed   uint64
	offset uint64
}

// word is a word of the stream; it needs no word before it.
func (n *noise) word(index uint64) uint64 {
	mixed := n.seed + (index+1)*0x9e3779b97f4a7c15
	mixed = (mixed ^ mixed>>30) * 0xbf58476d1ce4e5b9
	mixed = (mixed ^ mixed>>27) * 0x94d049bb133111eb
	return mixed ^ mixed>>31
}

// fill makes b the next bytes.
func (n *noise) fill(b []byte) {
	var word [8]byte
	for len(b) > 0 {
		binary.BigEndian.PutUint64(word[:], n.word(n.offset/8))
		k := copy(b, word[n.offset%8:])
		n.offset += uint64(k)
		b = b[k:]
	}
}
