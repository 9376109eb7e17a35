//! What one side has sent on a stream and may have to send again.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

/// Capacity of an empty queue beyond which its memory is given back.
const SPARE: usize = 8;

/// The bytes of one direction from the first that the peer has not reported as received.
///
/// Offsets count the bytes of the direction from 0. A chunk is a reference to the memory that the
/// carrier sends from.
#[derive(Debug, Default)]
pub(super) struct Retained {
    chunks: VecDeque<Bytes>,
    /// Offset of the first byte.
    base: u64,
    len: u64,
}

impl Retained {
    pub(super) fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.len += chunk.len() as u64;
            self.chunks.push_back(chunk);
        }
    }

    /// Offset of the byte that is pushed next.
    pub(super) fn end(&self) -> u64 {
        self.base + self.len
    }

    /// Number of bytes that are retained.
    #[cfg(test)]
    fn len(&self) -> u64 {
        self.len
    }

    /// Drops the bytes before this offset; `false` if it is beyond the end. An offset that was passed
    /// already changes nothing.
    pub(super) fn release(&mut self, to: u64) -> bool {
        if to > self.end() {
            return false;
        }
        let mut count = to.saturating_sub(self.base);
        self.base += count;
        self.len -= count;
        while let Some(first) = self.chunks.front_mut().filter(|_| count > 0) {
            let taken = count.min(first.len() as u64);
            count -= taken;
            match taken == first.len() as u64 {
                true => drop(self.chunks.pop_front()),
                // At most the length of a chunk.
                false => first.advance(taken as usize),
            }
        }
        if self.chunks.is_empty() && self.chunks.capacity() > SPARE {
            self.chunks = VecDeque::new();
        }
        true
    }

    /// At most `count` chunks of the bytes from this offset on; `None` if bytes before them were
    /// released, or if it is beyond the end.
    pub(super) fn from(&self, at: u64, count: usize) -> Option<Vec<Bytes>> {
        let mut skipped = at.checked_sub(self.base)?;
        if skipped > self.len {
            return None;
        }
        let mut found = Vec::new();
        for chunk in &self.chunks {
            let length = chunk.len() as u64;
            if skipped >= length {
                skipped -= length;
                continue;
            }
            // Less than the length of a chunk.
            found.push(chunk.slice(std::mem::take(&mut skipped) as usize..));
            if found.len() == count {
                break;
            }
        }
        Some(found)
    }

    /// Drops everything: it will not be sent again.
    pub(super) fn clear(&mut self) {
        *self = Self { base: self.end(), ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_not_released_is_found_from_any_offset(
            lengths in prop::collection::vec(0_usize..40, 0..30),
            releases in prop::collection::vec(0_u64..1400, 0..6),
            from in 0_u64..1400,
            count in 1_usize..40,
        ) {
            let all: Vec<u8> = (0..lengths.iter().sum::<usize>()).map(|at| at as u8).collect();
            let mut retained = Retained::default();
            let mut rest = Bytes::from(all.clone());
            for length in lengths {
                retained.push(rest.split_to(length));
            }
            let end = all.len() as u64;
            prop_assert_eq!(retained.end(), end);
            let mut base = 0;
            for release in releases {
                prop_assert_eq!(retained.release(release), release <= end);
                if release <= end {
                    base = base.max(release);
                }
                prop_assert_eq!((retained.end(), retained.len()), (end, end - base));
            }
            let found = retained.from(from, count);
            prop_assert_eq!(found.is_some(), (base..=end).contains(&from));
            if let Some(found) = found {
                prop_assert!(found.len() <= count && found.iter().all(|chunk| !chunk.is_empty()));
                let bytes = found.concat();
                prop_assert_eq!(&bytes[..], &all[from as usize..][..bytes.len()]);
                prop_assert!(found.len() == count || from + bytes.len() as u64 == end);
            }
            retained.clear();
            prop_assert_eq!((retained.end(), retained.len()), (end, 0));
            prop_assert_eq!(retained.from(end, 1), Some(vec![]));
        }
    }

    #[test]
    fn an_empty_queue_gives_its_memory_back() {
        let mut retained = Retained::default();
        (0..1000).for_each(|_| retained.push(Bytes::from_static(b"x")));
        assert!(retained.release(1000));
        assert!(retained.chunks.capacity() <= SPARE);
    }
}
