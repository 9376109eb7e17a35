//! Bursts of which repair shards have arrived, and which may lack bytes.

use std::time::{Duration, Instant};

use super::{
    super::{
        code::{self, Division, Malformed},
        datagram::Shards,
    },
    kept::Kept,
};

/// Maximum number of bursts.
const MAX_GROUPS: usize = 32;
/// Maximum number of bytes of their shards: a few bursts with most of their bytes lost.
const MAX_BYTES: usize = 256 * 1024;
/// Time after which a burst is given up: its bytes have been sent again by then.
const KEPT_FOR: Duration = Duration::from_secs(1);

/// The bursts, oldest first.
#[derive(Debug, Default)]
pub(super) struct Groups {
    groups: Vec<Group>,
    bytes: usize,
}

/// A burst that may lack bytes.
#[derive(Debug)]
pub(super) struct Group {
    stream: u64,
    offset: u64,
    division: Division,
    /// Repair shards that follow one another, with the number of the first; none overlap.
    parts: Vec<(usize, Vec<u8>)>,
    began: Instant,
    /// Whether more has arrived since it was last looked at.
    is_touched: bool,
}

impl Groups {
    pub(super) fn cost(&self) -> usize {
        self.bytes
    }

    /// Keeps repair shards that arrived.
    pub(super) fn put(&mut self, now: Instant, shards: &Shards<'_>) -> Result<(), Malformed> {
        let Shards { stream, offset, division, first, bytes } = *shards;
        let is_same = |group: &Group| group.stream == stream && group.offset == offset;
        let index = self.groups.iter().position(is_same);
        let index = index.unwrap_or_else(|| {
            let parts = Vec::new();
            self.groups.push(Group {
                stream,
                offset,
                division,
                parts,
                began: now,
                is_touched: true,
            });
            self.groups.len() - 1
        });
        let group = &mut self.groups[index];
        if group.division != division {
            return Err(Malformed::Differing);
        }
        let numbers = first..first + bytes.len() / division.size;
        let overlaps = |(first, bytes): &(usize, Vec<u8>)| {
            *first < numbers.end && numbers.start < first + bytes.len() / division.size
        };
        if !group.parts.iter().any(overlaps) && group.shards() < division.sources() {
            group.parts.push((first, bytes.to_vec()));
            group.is_touched = true;
            self.bytes += bytes.len();
        }
        while self.groups.len() > MAX_GROUPS || self.bytes > MAX_BYTES {
            self.remove(0);
        }
        Ok(())
    }

    /// Bytes of a stream have arrived.
    pub(super) fn touch(&mut self, stream: u64) {
        let of_stream = self.groups.iter_mut().filter(|group| group.stream == stream);
        of_stream.for_each(|group| group.is_touched = true);
    }

    /// Takes a burst that can be rebuilt. Drops those that lack nothing.
    pub(super) fn next(&mut self, kept: &Kept) -> Option<Group> {
        while let Some(index) = self.groups.iter().position(|group| group.is_touched) {
            let group = &mut self.groups[index];
            group.is_touched = false;
            let missing = group.known(kept).iter().filter(|is_known| !**is_known).count();
            if missing == 0 {
                self.remove(index);
            } else if missing <= group.shards() {
                return Some(self.remove(index));
            }
        }
        None
    }

    pub(super) fn forget(&mut self, stream: u64) {
        self.retain(|group| group.stream != stream);
    }

    pub(super) fn expire(&mut self, now: Instant) {
        self.retain(|group| now.saturating_duration_since(group.began) < KEPT_FOR);
    }

    pub(super) fn clear(&mut self) {
        self.retain(|_| false);
    }

    fn retain(&mut self, is_kept: impl Fn(&Group) -> bool) {
        self.groups.retain(|group| is_kept(group));
        self.bytes = self.groups.iter().map(Group::bytes).sum();
    }

    fn remove(&mut self, index: usize) -> Group {
        let group = self.groups.remove(index);
        self.bytes -= group.bytes();
        group
    }
}

impl Group {
    pub(super) fn stream(&self) -> u64 {
        self.stream
    }

    fn bytes(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Number of repair shards that have arrived.
    fn shards(&self) -> usize {
        self.bytes() / self.division.size
    }

    /// Which source shards have arrived.
    fn known(&self, kept: &Kept) -> Vec<bool> {
        let sources = self.division.sources();
        let Some(recent) = kept.get(self.stream) else { return vec![false; sources] };
        let mut known = vec![true; sources];
        for gap in recent.gaps(self.offset..self.offset + self.division.length as u64) {
            // Within the burst, whose length is one.
            let within = |position: u64| usize::try_from(position - self.offset).unwrap_or(0);
            let first = within(gap.start) / self.division.size;
            let last = within(gap.end - 1) / self.division.size;
            known[first..=last].fill(false);
        }
        known
    }

    /// The bytes that are missing, with their positions in the stream; `None` if the code fails.
    pub(super) fn rebuild(&self, kept: &Kept) -> Option<Vec<(u64, Vec<u8>)>> {
        let known = self.known(kept);
        let mut burst = vec![0; self.division.length];
        if let Some(recent) = kept.get(self.stream) {
            recent.copy_to(self.offset, &mut burst);
        }
        let repair = self.parts.iter().flat_map(|(first, bytes)| {
            bytes
                .chunks_exact(self.division.size)
                .zip(*first..)
                .map(|(shard, number)| (number, shard))
        });
        let mut rebuilt: Vec<(u64, Vec<u8>)> = Vec::new();
        for (source, bytes) in code::decode(self.division, &burst, &known, repair)? {
            let offset = self.offset + self.division.range(source).start as u64;
            match rebuilt.last_mut() {
                Some((start, before)) if *start + before.len() as u64 == offset => {
                    before.extend_from_slice(&bytes);
                }
                _ => rebuilt.push((offset, bytes)),
            }
        }
        Some(rebuilt)
    }
}
