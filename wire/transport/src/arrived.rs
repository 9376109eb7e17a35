//! Bytes of a stream that have arrived and have not been read, in few allocations.
//!
//! A peer chooses how short its frames are. Kept one by one, a frame of one byte would cost sixty
//! times its length, and the stream's window counts the byte alone.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Data shorter than this is copied out of its record, so that it does not keep the memory of the
/// whole read alive, which is up to 64 KiB.
const COPY_BELOW: usize = 8 * 1024;
/// Number of waiting bytes from which all data is copied: the reader does not keep up, so that what
/// is kept alive counts for more than the copy.
const BEHIND: usize = 128 * 1024;
/// Maximum length to which short data is joined.
const JOINED: usize = 16 * 1024;

/// The queue between a stream and its reader.
#[derive(Debug, Default)]
pub(crate) struct Arrived {
    chunks: VecDeque<Bytes>,
    /// Data that was copied; it follows `chunks`.
    joined: BytesMut,
    /// Number of bytes that wait.
    len: usize,
}

impl Arrived {
    pub(crate) fn push(&mut self, data: &Bytes) {
        self.len += data.len();
        if data.len() >= COPY_BELOW && self.len < BEHIND {
            self.seal();
            self.chunks.push_back(data.clone());
        } else {
            self.copy(data);
        }
    }

    /// Adds a copy of the data, whatever its length: none of the memory behind it stays alive.
    pub(crate) fn push_copy(&mut self, data: &Bytes) {
        self.len += data.len();
        self.copy(data);
    }

    fn copy(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.joined.len() == JOINED {
                self.seal();
                // More will follow, so that the buffer need not grow by doubling.
                self.joined.reserve(JOINED);
            }
            let (first, rest) = data.split_at(data.len().min(JOINED - self.joined.len()));
            self.joined.extend_from_slice(first);
            data = rest;
        }
    }

    /// Makes a chunk of the data that was joined.
    fn seal(&mut self) {
        if !self.joined.is_empty() {
            self.chunks.push_back(std::mem::take(&mut self.joined).freeze());
        }
    }

    /// Fills the front of `chunks`; how many it filled.
    pub(crate) fn take(&mut self, chunks: &mut [Bytes]) -> usize {
        if self.chunks.len() < chunks.len() {
            self.seal();
        }
        let count = chunks.len().min(self.chunks.len());
        for (chunk, arrived) in chunks.iter_mut().zip(self.chunks.drain(..count)) {
            self.len -= arrived.len();
            *chunk = arrived;
        }
        count
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Number of bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Arrived {
        /// Number of bytes that are allocated for data that was copied. A buffer that grew by
        /// doubling is at most twice as long as what it has.
        fn allocated(&self) -> usize {
            let slots = self.chunks.capacity() * size_of::<Bytes>();
            slots + 2 * self.chunks.iter().map(Bytes::len).sum::<usize>() + self.joined.capacity()
        }
    }

    /// The bytes of frames of these lengths, as they arrived and as they are read.
    fn pass(arrived: &mut Arrived, lengths: &[usize]) -> Vec<u8> {
        let mut sent = 0;
        for length in lengths {
            let frame: Vec<u8> = (sent..sent + length).map(|at| at as u8).collect();
            sent += length;
            arrived.push(&frame.into());
        }
        let mut read = Vec::new();
        let mut chunks = [const { Bytes::new() }; 3];
        loop {
            match arrived.take(&mut chunks) {
                0 => return read,
                count => read.extend(chunks[..count].concat()),
            }
        }
    }

    #[test]
    fn frames_of_one_byte_cost_at_most_three_times_their_length() {
        let mut arrived = Arrived::default();
        for count in 1..=2 * 1024 * 1024 {
            arrived.push(&Bytes::from_static(b"x"));
            assert!(arrived.allocated() <= 3 * count + 256, "{} for {count}", arrived.allocated());
        }
    }

    #[test]
    fn a_reader_that_is_far_behind_keeps_no_whole_reads_alive() {
        let mut arrived = Arrived::default();
        let frame = Bytes::from(vec![7; COPY_BELOW]);
        let count = 2 * 1024 * 1024 / COPY_BELOW;
        (0..count).for_each(|_| arrived.push(&frame));
        let kept = arrived.chunks.iter().filter(|chunk| chunk.as_ptr() == frame.as_ptr()).count();
        assert!((1..BEHIND / COPY_BELOW).contains(&kept), "{kept}");
        assert_eq!(arrived.len(), count * COPY_BELOW);
    }

    proptest! {
        #[test]
        fn every_byte_is_read_once_and_in_order(
            lengths in prop::collection::vec(prop_oneof![1_usize..20, 1_usize..20_000], 0..60),
        ) {
            let mut arrived = Arrived::default();
            let total: usize = lengths.iter().sum();
            let expected: Vec<u8> = (0..total).map(|at| at as u8).collect();
            prop_assert_eq!(pass(&mut arrived, &lengths), expected);
            prop_assert_eq!(arrived.len(), 0);
        }
    }
}
