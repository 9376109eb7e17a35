//! The latest bytes of one stream, in whatever order they have arrived.

use std::{collections::BTreeMap, ops::Range};

/// Maximum distance of the first byte from the last one: a burst, and what follows it soon.
pub(super) const WINDOW: u64 = 96 * 1024;
/// Maximum number of segments.
const MAX_SEGMENTS: usize = 128;
/// Maximum length of a segment that short ones are added to, in bytes.
const JOINED: usize = 1024;
/// Approximate cost of a segment beyond its bytes, in bytes.
const OVERHEAD: usize = 64;

/// The latest bytes of one stream.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// By the position of the first byte; none overlap.
    segments: BTreeMap<u64, Vec<u8>>,
    /// Position behind the last byte.
    end: u64,
    /// Number of bytes that the segments take.
    cost: usize,
}

impl Recent {
    /// Number of bytes that it takes.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// Keeps the bytes at this position, as far as they are not kept already.
    pub(super) fn insert(&mut self, offset: u64, bytes: &[u8]) {
        self.end = self.end.max(offset + bytes.len() as u64);
        let kept = self.end.saturating_sub(WINDOW)..self.end;
        for gap in self.gaps(offset.max(kept.start)..offset + bytes.len() as u64) {
            // Within the bytes, whose length is one.
            let start = usize::try_from(gap.start - offset).unwrap_or(usize::MAX);
            let length = usize::try_from(gap.end - gap.start).unwrap_or(usize::MAX);
            self.put(gap.start, &bytes[start..start + length]);
        }
        while self.segments.len() > MAX_SEGMENTS
            || self
                .segments
                .first_key_value()
                .is_some_and(|(offset, bytes)| offset + bytes.len() as u64 <= kept.start)
        {
            let Some((_, bytes)) = self.segments.pop_first() else { return };
            self.cost -= bytes.capacity() + OVERHEAD;
        }
    }

    /// Adds a segment, or to the one before.
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        if let Some((start, before)) = self.segments.range_mut(..offset).next_back()
            && start + before.len() as u64 == offset
            && before.len() + bytes.len() <= JOINED
        {
            self.cost -= before.capacity();
            before.extend_from_slice(bytes);
            self.cost += before.capacity();
            return;
        }
        let bytes = bytes.to_vec();
        self.cost += bytes.capacity() + OVERHEAD;
        self.segments.insert(offset, bytes);
    }

    /// The parts of a range that are not kept.
    pub(super) fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let (mut gaps, mut next) = (Vec::new(), range.start);
        for (start, bytes) in self.within(&range) {
            if next < *start {
                gaps.push(next..*start);
            }
            next = next.max(start + bytes.len() as u64);
        }
        if next < range.end {
            gaps.push(next..range.end);
        }
        gaps
    }

    /// Copies what is kept of the bytes from this position on to the same place in `target`.
    pub(super) fn copy_to(&self, offset: u64, target: &mut [u8]) {
        let range = offset..offset + target.len() as u64;
        for (start, bytes) in self.within(&range) {
            let both = range.start.max(*start)..range.end.min(start + bytes.len() as u64);
            // Both are within slices.
            let place = |base: u64| -> Range<usize> {
                let at = |position: u64| usize::try_from(position - base).unwrap_or(usize::MAX);
                at(both.start)..at(both.end)
            };
            target[place(offset)].copy_from_slice(&bytes[place(*start)]);
        }
    }

    /// The segments that have a part in a range.
    fn within<'a>(&'a self, range: &Range<u64>) -> impl Iterator<Item = (&'a u64, &'a Vec<u8>)> {
        let before = self.segments.range(..range.start).next_back();
        let range = range.start..range.end.max(range.start);
        let reaches = before.filter(|(start, bytes)| *start + bytes.len() as u64 > range.start);
        reaches.into_iter().chain(self.segments.range(range))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The byte at a position of the stream.
    fn byte(position: u64) -> u8 {
        (position % 251) as u8
    }

    fn bytes(range: Range<u64>) -> Vec<u8> {
        range.map(byte).collect()
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_came(
            pieces in prop::collection::vec((0_u64..5000, 1_u64..700), 1..60),
            asked in (0_u64..5000, 1_u64..3000),
        ) {
            let (mut recent, mut came) = (Recent::default(), vec![false; 6000]);
            for (offset, length) in pieces {
                let range = offset..offset + length;
                recent.insert(offset, &bytes(range.clone()));
                came[range.start as usize..range.end as usize].fill(true);
            }
            let range = asked.0..asked.0 + asked.1;
            let mut kept = vec![true; asked.1 as usize];
            for gap in recent.gaps(range.clone()) {
                prop_assert!(gap.start < gap.end);
                kept[(gap.start - range.start) as usize..(gap.end - range.start) as usize].fill(false);
            }
            let came: Vec<bool> =
                range.clone().map(|at| came.get(at as usize) == Some(&true)).collect();
            prop_assert_eq!(&kept, &came);
            let mut target = vec![255; asked.1 as usize];
            recent.copy_to(range.start, &mut target);
            for (at, (byte_there, came)) in range.zip(target.into_iter().zip(came)) {
                prop_assert_eq!(byte_there, if came { byte(at) } else { 255 });
            }
        }

        #[test]
        fn it_takes_no_more_than_its_window(
            pieces in prop::collection::vec((0_u64..1 << 40, 1_u64..3000), 1..300),
            far: bool,
        ) {
            let mut recent = Recent::default();
            for (offset, length) in pieces {
                let offset = if far { offset } else { offset % (2 * WINDOW) };
                recent.insert(offset, &bytes(offset..offset + length));
                let all: usize =
                    recent.segments.values().map(|bytes| bytes.capacity() + OVERHEAD).sum();
                prop_assert_eq!(recent.cost(), all);
                prop_assert!(recent.segments.len() <= MAX_SEGMENTS);
                // The first segment may begin before the window, and short ones have room to grow.
                prop_assert!(all <= 2 * (WINDOW as usize + 3000) + MAX_SEGMENTS * OVERHEAD);
            }
        }
    }

    #[test]
    fn short_pieces_are_joined() {
        let mut recent = Recent::default();
        for position in 0..5000 {
            recent.insert(position, &[byte(position)]);
        }
        assert!(recent.segments.len() <= 5, "{}", recent.segments.len());
        assert_eq!(recent.gaps(0..5001).first(), Some(&(5000..5001)));
    }
}
