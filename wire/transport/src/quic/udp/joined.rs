//! Packets that the kernel has joined on receiving (GRO), handed on one by one.
//!
//! quinn copies what one message brought into one allocation and slices its packets from it, so that
//! a packet whose bytes wait for their reader keeps up to 63 others alive. Handed on one by one,
//! each packet is an allocation of its own, for a copy of it.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
};

use quinn::udp::RecvMeta;

/// Maximum number of messages that are received with one call.
const MESSAGES: usize = 16;
/// Maximum length of a message, in bytes.
const MESSAGE: usize = 65_536;

/// The messages of one call, and how far they were handed on.
pub(super) struct Joined {
    /// Room for [`MESSAGES`] messages. The kernel writes to as much of it as it needs.
    buffer: Box<[u8]>,
    metas: [RecvMeta; MESSAGES],
    /// Number of messages that were received.
    count: usize,
    /// The message whose next packet is handed on next.
    message: usize,
    /// Where this packet begins in the message.
    offset: usize,
}

impl Joined {
    pub(super) fn new() -> Self {
        let buffer = vec![0; MESSAGES * MESSAGE].into();
        Self { buffer, metas: [RecvMeta::default(); MESSAGES], count: 0, message: 0, offset: 0 }
    }

    /// Whether all packets were handed on.
    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.message == self.count
    }

    /// Receives messages with this call, once all packets were handed on.
    pub(super) fn receive(
        &mut self,
        call: impl FnOnce(&mut [IoSliceMut<'_>], &mut [RecvMeta]) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut messages = self.buffer.chunks_exact_mut(MESSAGE);
        let mut bufs: [_; MESSAGES] =
            std::array::from_fn(|_| IoSliceMut::new(messages.next().unwrap_or_default()));
        let count = call(&mut bufs, &mut self.metas)?;
        (self.count, self.message, self.offset) = (count, 0, 0);
        Ok(())
    }

    /// Copies the next packets into the front of `bufs`, each with its message's marks and
    /// addresses; their number. One that is longer than its buffer is dropped: the peer was sent the
    /// limit. So is one that is not admitted.
    pub(super) fn hand_on(
        &mut self,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
        mut admits: impl FnMut(&[u8], SocketAddr) -> bool,
    ) -> usize {
        let room = bufs.len().min(metas.len());
        let mut handed_on = 0;
        while handed_on < room && self.message < self.count {
            let meta = self.metas[self.message];
            let message = &self.buffer[self.message * MESSAGE..][..meta.len.min(MESSAGE)];
            let stride = if meta.stride == 0 { meta.len } else { meta.stride };
            let rest = &message[self.offset..];
            let packet = &rest[..stride.min(rest.len())];
            if let Some(buf) = bufs[handed_on].get_mut(..packet.len())
                && !packet.is_empty()
                && admits(packet, meta.addr)
            {
                buf.copy_from_slice(packet);
                metas[handed_on] = RecvMeta { len: packet.len(), stride: packet.len(), ..meta };
                handed_on += 1;
            }
            self.offset += packet.len();
            if self.offset == message.len() {
                (self.message, self.offset) = (self.message + 1, 0);
            }
        }
        handed_on
    }
}

impl std::fmt::Debug for Joined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { count, message, offset, .. } = self;
        write!(f, "Joined({message} of {count}, {offset})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use quinn::udp::EcnCodepoint;

    use super::*;

    /// Receives messages of these lengths and strides, all of whose bytes differ from their
    /// neighbours'.
    fn receive(joined: &mut Joined, messages: &[(usize, usize)]) {
        let call = |bufs: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]| {
            for (index, &(len, stride)) in messages.iter().enumerate() {
                let bytes = (0..len).map(|at| (at * 7 + index) as u8);
                bufs[index].iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
                let addr = ([127, 0, 0, 1], index as u16).into();
                let ecn = Some(EcnCodepoint::Ce);
                metas[index] = RecvMeta { addr, len, stride, ecn, dst_ip: Some(addr.ip()) };
            }
            Ok(messages.len())
        };
        joined.receive(call).unwrap();
    }

    /// All packets that are handed on into buffers of 1500 bytes.
    fn packets(joined: &mut Joined, room: usize) -> Vec<(RecvMeta, Vec<u8>)> {
        let mut packets = Vec::new();
        while !joined.is_empty() {
            let mut bufs = vec![[0; 1500]; room];
            let mut metas = vec![RecvMeta::default(); room];
            let mut slices: Vec<_> = bufs.iter_mut().map(|buf| IoSliceMut::new(buf)).collect();
            let count = joined.hand_on(&mut slices, &mut metas, |_, _| true);
            packets.extend((0..count).map(|at| (metas[at], bufs[at][..metas[at].len].to_vec())));
        }
        packets
    }

    proptest! {
        #[test]
        fn every_packet_is_handed_on_once_with_its_marks(
            messages in prop::collection::vec((1_usize..9000, 0_usize..=1500), 0..MESSAGES),
            room in 1_usize..40,
        ) {
            let mut joined = Joined::new();
            receive(&mut joined, &messages);
            let mut expected = Vec::new();
            for (index, &(len, stride)) in messages.iter().enumerate() {
                let bytes: Vec<u8> = (0..len).map(|at| (at * 7 + index) as u8).collect();
                let stride = if stride == 0 { len } else { stride };
                let fits = |packet: &&[u8]| packet.len() <= 1500;
                expected.extend(
                    bytes.chunks(stride).filter(fits).map(|packet| (index, packet.to_vec())),
                );
            }
            let handed_on = packets(&mut joined, room);
            prop_assert_eq!(handed_on.len(), expected.len());
            for ((meta, packet), (index, bytes)) in handed_on.into_iter().zip(expected) {
                prop_assert_eq!(usize::from(meta.addr.port()), index);
                prop_assert_eq!((meta.len, meta.stride), (bytes.len(), bytes.len()));
                prop_assert_eq!((meta.ecn, meta.dst_ip), (Some(EcnCodepoint::Ce), Some(meta.addr.ip())));
                prop_assert_eq!(packet, bytes);
            }
        }
    }

    #[test]
    fn an_empty_message_is_passed_over() {
        let mut joined = Joined::new();
        receive(&mut joined, &[(0, 0), (1, 1), (0, 0)]);
        assert_eq!(packets(&mut joined, 1).len(), 1);
    }
}
