use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::{
    super::{amount, code::Division, datagram::Shards},
    *,
};

const STREAM: u64 = 4;

/// A packet with these frames.
fn packet(frames: &[&[u8]]) -> BytesMut {
    BytesMut::from(&frames.concat()[..])
}

/// A STREAM frame that reaches to the end of its packet, or has a length.
fn stream_frame(offset: u64, bytes: &[u8], is_counted: bool) -> Vec<u8> {
    let copy = Copy { stream: STREAM, offset, bytes, is_last: false };
    let mut frame = BytesMut::new();
    put_stream_head(&mut frame, &copy, is_counted);
    [&frame[..], bytes].concat()
}

/// A DATAGRAM frame that reaches to the end of its packet, or has a length.
fn datagram_frame(datagram: &[u8], is_counted: bool) -> Vec<u8> {
    let length = u16::try_from(datagram.len()).unwrap();
    let head = match length {
        _ if !is_counted => vec![0x30],
        0..0x40 => vec![0x31, length as u8],
        _ => [&[0x31][..], &(length | 1 << 14).to_be_bytes()].concat(),
    };
    [&head, datagram].concat()
}

/// The repair shards of a burst, in datagrams.
fn repair(offset: u64, burst: &[u8], datagrams: usize) -> Vec<Bytes> {
    let size = amount::shard_size(burst.len(), 1200);
    let each = 1200 / size;
    let division = Division::new(burst.len(), size, each * datagrams).unwrap();
    let shards = code::encode(division, burst);
    let datagrams = shards.chunks(each * size).enumerate().map(|(number, bytes)| {
        Shards { stream: STREAM, offset, division, first: number * each, bytes }.encode()
    });
    datagrams.collect()
}

fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..length).map(|_| random.u8(..)).collect()
}

/// What quinn makes of packets: the bytes of one stream, each once and in order.
#[derive(Debug, Default)]
struct Reader {
    ahead: BTreeMap<u64, Vec<u8>>,
    read: Vec<u8>,
    datagrams: usize,
}

impl Reader {
    fn take(&mut self, payload: &[u8]) {
        for frame in Frames::of(payload) {
            match frame {
                Frame::Stream { id, offset, bytes } => {
                    assert_eq!(id, STREAM);
                    let ahead = self.ahead.entry(offset).or_default();
                    if ahead.len() < bytes.len() {
                        *ahead = bytes.to_vec();
                    }
                }
                Frame::Datagram { .. } => self.datagrams += 1,
                Frame::Unknown { .. } => panic!("quinn closes the connection: {payload:x?}"),
                _ => {}
            }
        }
        while let Some((offset, bytes)) = self.ahead.pop_first() {
            let next = self.read.len() as u64;
            if offset > next {
                self.ahead.insert(offset, bytes);
                return;
            }
            self.read.extend(bytes.iter().skip((next - offset) as usize));
        }
    }
}

fn restorer(start: Instant) -> Restorer {
    code::prepare();
    let mut restorer = Restorer::new(start, 1 << 20);
    // Shards of another stream show that the peer sends some.
    let other = Shards {
        stream: 400,
        offset: 0,
        division: Division::new(100, 64, 1).unwrap(),
        first: 0,
        bytes: &[0; 64],
    };
    let mut payload = packet(&[&datagram_frame(&other.encode(), true)]);
    assert_eq!(restorer.restore(start, &mut payload, |_, _| 0), Ok(()));
    restorer
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is lost, late or repeated, and whichever copies and shards overlap: what is read is
    /// what was sent, and all of it if what is lost can be repaired.
    #[test]
    fn bytes_are_read_as_they_were_sent(
        lengths in prop::collection::vec(1_usize..20_000, 1..5),
        packet_length in 500_usize..1400,
        datagrams in 1_usize..8,
        (losses, shuffled) in (0_usize..6, 0_usize..20),
        seed: u64,
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let start = Instant::now();
        let mut restorer = restorer(start);
        let (mut sent, mut packets) = (Vec::new(), Vec::new());
        let mut is_repairable = true;
        for length in lengths {
            let (offset, burst) = (sent.len() as u64, bytes(length, seed));
            let mut frames = Vec::new();
            for (number, part) in burst.chunks(packet_length).enumerate() {
                let at = offset + (number * packet_length) as u64;
                frames.push(packet(&[&[0x01], &stream_frame(at, part, random.bool())]));
                if random.u8(..4) == 0 {
                    let copy = Copy { stream: STREAM, offset: at, bytes: part, is_last: false };
                    frames.push(packet(&[&datagram_frame(&copy.encode(), random.bool())]));
                }
            }
            let shards = repair(offset, &burst, datagrams);
            let (size, room) = (amount::shard_size(length, 1200), 1200);
            // Each lost packet costs its shards, or as many repair shards.
            let cost = ((packet_length - 1) / size + 2).max(room / size);
            is_repairable &= losses == 0 || losses * cost <= shards.len() * (room / size);
            let with_shards = shards.iter().map(|it| packet(&[&datagram_frame(it, random.bool())]));
            frames.extend(with_shards);
            for _ in 0..losses.min(frames.len()) {
                frames.remove(random.usize(..frames.len()));
            }
            packets.append(&mut frames);
            sent.extend_from_slice(&burst);
        }
        for _ in 0..shuffled {
            let (one, other) = (random.usize(..packets.len().max(1)), random.usize(..packets.len().max(1)));
            if one < packets.len() && other < packets.len() {
                packets.swap(one, other);
            }
        }
        for _ in 0..random.usize(..5) {
            let repeated = packets.get(random.usize(..packets.len().max(1))).cloned();
            packets.extend(repeated);
        }
        let mut reader = Reader::default();
        for (number, mut payload) in (0_u64..).zip(packets) {
            let now = start + Duration::from_micros(number * 100);
            let restored = restorer.restore(now, &mut payload, |_, _| 1);
            prop_assert_eq!(restored, Ok(()));
            reader.take(&payload);
        }
        prop_assert_eq!(reader.datagrams, 0);
        prop_assert_eq!(&reader.read[..], &sent[..reader.read.len()]);
        if is_repairable {
            prop_assert_eq!(reader.read.len(), sent.len());
        }
    }

    /// Whatever a peer sends, memory is bounded, and quinn gets frames that it can parse.
    #[test]
    fn any_datagrams_are_ignored_restored_or_refused(
        datagrams in prop::collection::vec(
            (0x20_u8..0x23, 0_u64..8, 0_u64..5000, prop::collection::vec(any::<u8>(), 0..300)), 1..60),
    ) {
        let start = Instant::now();
        let mut restorer = restorer(start);
        for (kind, stream, offset, rest) in datagrams {
            let datagram = [&[kind][..], &stream.to_be_bytes(), &offset.to_be_bytes(), &rest].concat();
            let mut payload = packet(&[&datagram_frame(&datagram, true), &[0x01]]);
            let restored = restorer.restore(start, &mut payload, |_, _| 1);
            prop_assert!(restorer.cost() <= (1 << 20) + (256 << 10));
            if restored.is_err() {
                return Ok(());
            }
            let is_known = |frame| !matches!(frame, Frame::Unknown { .. } | Frame::Datagram { .. });
            prop_assert!(Frames::of(&payload).all(is_known));
        }
    }
}

#[test]
fn a_copy_becomes_a_frame_of_its_stream_in_its_place() {
    let start = Instant::now();
    for is_counted in [true, false] {
        for length in [0, 1, 40, 63, 64, 1000] {
            let bytes = bytes(length, 1);
            for is_last in [true, false] {
                let copy = Copy { stream: STREAM, offset: 9, bytes: &bytes, is_last };
                let frame = datagram_frame(&copy.encode(), is_counted);
                let mut payload = packet(&[&[0x01], &frame]);
                let mut restorer = Restorer::new(start, 1 << 20);
                let mut ends = Vec::new();
                restorer
                    .restore(start, &mut payload, |id, end| {
                        ends.push((id, end));
                        1
                    })
                    .unwrap();
                let frames: Vec<_> = Frames::of(&payload).collect();
                let stream = Frame::Stream { id: STREAM, offset: 9, bytes: &bytes };
                assert!(frames.contains(&stream), "{frames:?}");
                assert_eq!(ends, [(STREAM, 9 + length as u64)]);
                assert_eq!(restorer.used, 1);
                let kinds = payload.iter().skip(1).find(|byte| **byte != 0).unwrap();
                assert_eq!(kinds & 1 == 1, is_last);
                assert_eq!(payload.len(), 1 + frame.len());
            }
        }
    }
}

#[test]
fn a_long_copy_without_a_length_of_its_own_fits_its_place() {
    let (start, bytes) = (Instant::now(), bytes(20_000, 1));
    let copy = Copy { stream: STREAM, offset: 9, bytes: &bytes, is_last: false };
    // The type in two bytes.
    let mut payload = packet(&[&[0x40, 0x30], &copy.encode()]);
    Restorer::new(start, 1 << 20).restore(start, &mut payload, |_, _| 1).unwrap();
    let stream = Frame::Stream { id: STREAM, offset: 9, bytes: &bytes };
    assert_eq!(Frames::of(&payload).last(), Some(stream));
}

#[test]
fn shards_and_datagrams_of_later_revisions_become_pings() {
    let start = Instant::now();
    let mut restorer = restorer(start);
    for datagram in [&repair(0, &[1; 2000], 1)[0][..], &[0x23, 1, 2]] {
        let mut payload = packet(&[&datagram_frame(datagram, true), &[0x01]]);
        restorer.restore(start, &mut payload, |_, _| 1).unwrap();
        assert_eq!(payload[..], [0x01, 0x01]);
    }
}

#[test]
fn several_datagrams_of_a_packet_are_replaced() {
    let start = Instant::now();
    let copy = |offset, bytes| Copy { stream: STREAM, offset, bytes, is_last: false }.encode();
    let mut payload = packet(&[
        &datagram_frame(&repair(0, &[1; 2000], 1)[0], true),
        &datagram_frame(&copy(7, b"seven"), true),
        &datagram_frame(&[0x23, 1, 2], true),
        &datagram_frame(&copy(20, &[9; 100]), true),
        &stream_frame(30, b"rest", false),
    ]);
    restorer(start).restore(start, &mut payload, |_, _| 1).unwrap();
    let stream = |offset, bytes| Frame::Stream { id: STREAM, offset, bytes };
    let frames = Frames::of(&payload).filter(|frame| *frame != Frame::Padding);
    let expected = [
        Frame::Other,
        stream(7, b"seven"),
        Frame::Other,
        stream(20, &[9; 100]),
        stream(30, b"rest"),
    ];
    assert_eq!(frames.collect::<Vec<_>>(), expected);
}

#[test]
fn shards_that_differ_from_earlier_ones_of_their_burst_are_refused() {
    let start = Instant::now();
    let mut restorer = restorer(start);
    let mut restore = |datagram: &[u8]| {
        let mut payload = packet(&[&datagram_frame(datagram, true)]);
        restorer.restore(start, &mut payload, |_, _| 1)
    };
    assert_eq!(restore(&repair(0, &[1; 2000], 1)[0]), Ok(()));
    assert_eq!(restore(&repair(5, &[1; 2001], 1)[0]), Ok(()));
    assert_eq!(restore(&repair(0, &[1; 2001], 1)[0]), Err(Malformed::Differing));
    assert_eq!(restore(&[0x21]), Ok(()), "nothing is looked at any more");
}

#[test]
fn a_peer_has_few_bursts_rebuilt_in_a_second() {
    let start = Instant::now();
    let mut restorer = restorer(start);
    for number in 0..400_u64 {
        let burst = bytes(2000, number);
        let offset = number * 2000;
        let now = start + Duration::from_millis(number);
        let mut first = packet(&[&stream_frame(offset, &burst[..1000], true)]);
        restorer.restore(now, &mut first, |_, _| 1).unwrap();
        for datagram in repair(offset, &burst, 1) {
            let mut payload = packet(&[&datagram_frame(&datagram, true)]);
            restorer.restore(now, &mut payload, |_, _| 1).unwrap();
        }
        if number % 150 == 0 {
            restorer.expire(now);
        }
    }
    assert!((100..=140).contains(&restorer.rebuilt), "{}", restorer.rebuilt);
}

#[test]
fn nothing_is_kept_before_repair_shards_come_and_long_after_them() {
    let start = Instant::now();
    let mut restorer = Restorer::new(start, 1 << 20);
    let keep = |restorer: &mut Restorer, now| {
        let mut payload = packet(&[&stream_frame(0, &[1; 100], true)]);
        restorer.restore(now, &mut payload, |_, _| 1).unwrap();
        restorer.cost()
    };
    assert_eq!(keep(&mut restorer, start), 0);
    let shards = datagram_frame(&repair(0, &[1; 2000], 1)[0], true);
    restorer.restore(start, &mut packet(&[&shards]), |_, _| 1).unwrap();
    assert!(keep(&mut restorer, start) > 1000);
    assert!(restorer.expire(start));
    restorer.forget(STREAM);
    assert_eq!(restorer.cost(), 0);
    assert!(!restorer.expire(start + EXPECTED) && restorer.is_keeping());
    assert!(!restorer.expire(start + EXPECTED * 2) && !restorer.is_keeping());
}
