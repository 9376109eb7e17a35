//! Chunks of a stream as DATA packets.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::{Bytes, BytesMut};

use super::packet::Packet;

/// Sends the bytes of one connection as DATA packets, and counts those that were taken.
#[derive(Debug)]
pub struct DataWriter {
    connect_id: i64,
    max_len: usize,
    taken: Arc<AtomicU64>,
}

impl DataWriter {
    /// A writer of packets with at most `max_len` bytes each for the connection with this id.
    pub fn new(connect_id: i64, max_len: usize) -> Self {
        Self { connect_id, max_len, taken: Arc::default() }
    }

    /// Sends all bytes of `chunks`, which are left empty, packet by packet with `send`.
    ///
    /// # Errors
    /// The first error of `send`, after which no packet follows.
    ///
    /// # Cancel safety
    /// Not cancel safe: dropping the future loses what was not sent.
    pub async fn write<F, E>(
        &self,
        chunks: &mut [Bytes],
        mut send: impl FnMut(Packet) -> F,
    ) -> Result<(), E>
    where
        F: Future<Output = Result<(), E>>,
    {
        for piece in batches(chunks, self.max_len) {
            let length = piece.len() as u64;
            send(Packet::data(self.connect_id, piece)).await?;
            self.taken.fetch_add(length, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Counter of the bytes that `send` has taken so far.
    pub fn taken(&self) -> Arc<AtomicU64> {
        self.taken.clone()
    }
}

/// The bytes of `chunks`, in order, in as few pieces of at most `max_len` bytes as possible without
/// copying a chunk that is a piece by itself.
///
/// One packet of a tunnel's payload is too little for a gRPC message of its own. Each chunk is
/// left empty once its bytes were taken.
fn batches(chunks: &mut [Bytes], max_len: usize) -> impl Iterator<Item = Bytes> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let mut fitting = |room: usize| {
            while chunks.get(next).is_some_and(Bytes::is_empty) {
                next += 1;
            }
            let chunk = chunks.get_mut(next).filter(|chunk| chunk.len() <= room)?;
            Some(std::mem::take(chunk))
        };
        let Some(first) = fitting(max_len) else {
            // Either the end, or a chunk that is longer than a piece may be.
            return chunks.get_mut(next).map(|chunk| chunk.split_to(max_len));
        };
        let Some(second) = fitting(max_len - first.len()) else { return Some(first) };
        let mut length = first.len() + second.len();
        let mut joined = vec![first, second];
        while let Some(chunk) = fitting(max_len - length) {
            length += chunk.len();
            joined.push(chunk);
        }
        // No longer than what it has: the piece waits for the peer, and counts with its length.
        let mut piece = BytesMut::with_capacity(length);
        joined.iter().for_each(|chunk| piece.extend_from_slice(chunk));
        Some(piece.freeze())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(chunks: &[&'static [u8]], max_len: usize) -> Vec<Bytes> {
        let mut chunks: Vec<_> = chunks.iter().map(|chunk| Bytes::from_static(chunk)).collect();
        let pieces = batches(&mut chunks, max_len).collect();
        assert!(chunks.iter().all(Bytes::is_empty), "{chunks:?} was not taken");
        pieces
    }

    #[test]
    fn small_chunks_are_joined_and_large_ones_are_cut() {
        assert_eq!(pieces(&[b"ab", b"", b"c", b"de", b"f"], 5), ["abcde", "f"]);
        assert_eq!(pieces(&[b"abcdef", b"g"], 4), ["abcd", "efg"]);
        assert_eq!(pieces(&[b"", b""], 4), [""; 0]);
    }

    #[test]
    fn a_chunk_by_itself_is_not_copied() {
        let chunk = Bytes::from(vec![7; 100]);
        let address = chunk.as_ptr();
        for max_len in [100, 1000] {
            let pieces: Vec<_> = batches(&mut [Bytes::new(), chunk.clone()], max_len).collect();
            assert_eq!(pieces, std::slice::from_ref(&chunk));
            assert_eq!(pieces[0].as_ptr(), address);
        }
    }

    proptest! {
        #[test]
        fn every_byte_is_in_one_piece_in_order(
            lengths in prop::collection::vec(0_usize..40, 0..20), max_len in 1_usize..50,
        ) {
            let bytes: Vec<_> = (0..lengths.iter().sum()).map(|at: usize| at as u8).collect();
            let mut rest = Bytes::from(bytes.clone());
            let mut chunks: Vec<_> =
                lengths.into_iter().map(|length| rest.split_to(length)).collect();
            let pieces: Vec<_> = batches(&mut chunks, max_len).collect();
            prop_assert!(pieces.iter().all(|piece| (1..=max_len).contains(&piece.len())));
            prop_assert_eq!(pieces.concat(), bytes);
        }
    }
}
