//! A connection whose peer may send anything while this side uses it: for the fuzzer, and for a
//! test that tries random scripts where no fuzzer runs.
//!
//! The first byte of a script holds flags; then come steps of four bytes, some of which are
//! followed by bytes of the peer. After every step the invariants of the connection are checked,
//! and what it sends is read as a peer would read it.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};

use super::{
    super::{
        fault::Fault,
        frame::{Frame, MAX_RECORD, Parameters, split_record},
        stream::{Room, Stream},
    },
    Mux, Received, Role, SEND_BUFFER,
    incoming::MAX_URGENT,
    outgoing::BATCH,
};

/// Number of bytes that may arrive on a stream before they are read: few, so that scripts reach the
/// limit.
const WINDOW: u32 = 1024;
/// Number of streams that the peer may have open.
const MAX_STREAMS: u32 = 8;
/// Length of a written chunk, in bytes, per unit of the script's byte.
const CHUNK_UNIT: usize = 300;

/// Flag: this side is the server.
const SERVER: u8 = 1 << 0;
/// Flag: the peer has sent its transport parameters.
const BEGUN: u8 = 1 << 1;
/// Flag: the peer's bytes of a step are frames, which are put into records of the right length.
const RECORDS: u8 = 1 << 2;

/// How a script ended.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::qmux) enum Ended {
    /// All of it was followed.
    Script,
    /// The peer closed the connection.
    Closed,
    /// The peer broke the protocol.
    Fault(Fault),
}

/// Follows a script to its end.
///
/// # Panics
/// When an invariant does not hold.
pub(in crate::qmux) fn exercise(script: &[u8]) -> Ended {
    let mut script = Script(script);
    let Some(flags) = script.byte() else { return Ended::Script };
    let role = if flags & SERVER == 0 { Role::Client } else { Role::Server };
    let mut exercise = Exercise {
        mux: Mux::new(role, WINDOW, MAX_STREAMS, 30_000),
        records: flags & RECORDS != 0,
        input: BytesMut::new(),
        ids: Vec::new(),
        max_streams: MAX_STREAMS.into(),
        caused_here: 1,
        sent: Sent::default(),
    };
    let ended = exercise.follow(script, flags & BEGUN != 0).unwrap_or(Ended::Script);
    if let Ended::Fault(fault) = &ended {
        exercise.mux.close(false, 0x0a, &fault.to_string());
    }
    exercise.drain();
    ended
}

/// The rest of a script.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    /// The next `length` bytes, or all that are left.
    fn bytes(&mut self, length: u16) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(usize::from(length).min(self.0.len()));
        self.0 = rest;
        bytes
    }
}

struct Exercise {
    mux: Mux,
    records: bool,
    input: BytesMut,
    /// Streams that this side has opened or accepted.
    ids: Vec<u64>,
    /// Largest number of streams that the peer was ever allowed to have open.
    max_streams: u64,
    /// Number of frames that this side may have caused without the peer.
    caused_here: usize,
    sent: Sent,
}

impl Exercise {
    /// Follows the script; `None` at its end.
    fn follow(&mut self, mut script: Script<'_>, begun: bool) -> Option<Ended> {
        if begun {
            let parameters = Parameters {
                max_data: 12_000,
                max_stream_data_local: 10_000,
                max_stream_data_remote: 10_000,
                max_streams: 4,
                ..Parameters::default()
            };
            self.mux.receive(Frame::Parameters(parameters)).expect("these come first");
        }
        loop {
            if let Err(ended) = self.step(&mut script)? {
                return Some(ended);
            }
            self.check();
        }
    }

    fn step(&mut self, script: &mut Script<'_>) -> Option<Result<(), Ended>> {
        let [step, first, second, third] = script.array()?;
        match step % 8 {
            0..=3 => {
                let bytes = script.bytes(u16::from_be_bytes([first, second]));
                return Some(self.receive(bytes));
            }
            4 => self.ids.extend(self.mux.accept().map(|(id, _)| id)),
            5 => self.ids.extend(self.mux.open().map(|(id, _)| id)),
            6 => self.use_stream(first.into(), second, third),
            _ => self.use_connection(first, second),
        }
        self.caused_here += 1;
        Some(Ok(()))
    }

    /// Takes the peer's bytes as the reading task does.
    fn receive(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        if self.records {
            for frames in bytes.chunks(MAX_RECORD) {
                let head = u16::try_from(frames.len()).expect("a record is short") | 0x4000;
                self.input.extend_from_slice(&head.to_be_bytes());
                self.input.extend_from_slice(frames);
            }
        } else {
            self.input.extend_from_slice(bytes);
        }
        let fault = |fault: Fault| Ended::Fault(fault);
        while let Some(mut record) = split_record(&mut self.input).map_err(|f| fault(f.into()))? {
            while !record.is_empty() {
                let frame = Frame::decode(&mut record).map_err(|f| fault(f.into()))?;
                check_encoding(&frame);
                if let Received::Closed { .. } = self.mux.receive(frame).map_err(fault)? {
                    return Err(Ended::Closed);
                }
            }
        }
        assert!(self.input.len() < 8 + MAX_RECORD, "a whole record waits");
        Ok(())
    }

    fn use_stream(&mut self, index: usize, operation: u8, argument: u8) {
        let Some(id) = self.ids.get(index % self.ids.len().max(1)).copied() else { return };
        let mux = &mut self.mux;
        match operation % 8 {
            0 | 1 => {
                let mut chunk = Bytes::from(vec![argument; usize::from(argument) * CHUNK_UNIT]);
                let room = mux.write(id, &mut chunk);
                assert!(chunk.is_empty() || room != Room::Taken, "a chunk is taken whole");
            }
            2 | 3 => {
                let mut chunks = [const { Bytes::new() }; 4];
                let count = usize::from(argument % 4) + 1;
                mux.read(id, &mut chunks[..count]);
            }
            4 => mux.finish(id),
            5 => mux.reset(id, argument.into()),
            6 => mux.stop(id, argument.into()),
            _ if argument & 1 == 0 => drop(mux.reset_of(id)),
            _ => mux.set_priority(id, i32::from(argument) - 128),
        }
    }

    fn use_connection(&mut self, operation: u8, argument: u8) {
        match operation % 4 {
            0 | 1 => self.drain(),
            2 => drop(self.mux.ping()),
            _ => {
                let count = u32::from(argument) % 32;
                self.max_streams = self.max_streams.max(count.into());
                self.mux.set_max_streams(count);
            }
        }
    }

    /// Sends everything that may be sent.
    fn drain(&mut self) {
        let mut output = BytesMut::new();
        loop {
            self.mux.fill(&mut output);
            if output.is_empty() {
                break;
            }
            assert!(output.len() <= BATCH + 2 * (MAX_RECORD + 2), "{} bytes at once", output.len());
            self.sent.read(&mut output);
        }
        assert!(!self.mux.has_work(), "there is work that produces nothing");
        self.caused_here = 0;
    }

    /// Checks the invariants: whatever the peer can make grow is bounded, limits are kept, and a
    /// stream that may send has a turn.
    fn check(&self) {
        let mux = &self.mux;
        let theirs = mux.streams.keys().filter(|id| *id & 1 != mux.role.bit()).count() as u64;
        assert!(theirs <= self.max_streams, "the peer has {theirs} streams");
        assert_eq!(theirs, mux.remote_opened - mux.remote_closed);
        assert!(mux.remote_opened <= mux.remote_granted);
        assert!(mux.remote_announced <= mux.remote_granted);
        assert!(mux.local_opened <= mux.local_allowed);
        assert!(mux.streams.len() as u64 <= theirs + mux.local_opened);
        assert!(mux.unaccepted.len() as u64 <= mux.remote_opened);
        let urgent = mux.urgent.len();
        assert!(urgent <= MAX_URGENT + 2 + self.caused_here, "{urgent} frames wait");
        assert!(mux.data_sent <= mux.data_allowed);
        for (id, stream) in &mux.streams {
            self.check_stream(*id, stream);
        }
    }

    fn check_stream(&self, id: u64, stream: &Stream) {
        let (mux, send) = (&self.mux, &stream.send);
        send.check();
        stream.recv.check();
        assert!(!stream.is_closed(), "stream {id} is kept");
        let held = stream.recv.waiting();
        assert!(held <= WINDOW as usize, "stream {id} holds {held} bytes");
        let queued = send.queued();
        assert!(queued < SEND_BUFFER + 256 * CHUNK_UNIT, "stream {id} has {queued} bytes");
        let turns = mux.ready.get(&send.priority);
        let turns = turns.map_or(0, |band| band.iter().filter(|other| **other == id).count());
        assert!(turns <= 1, "stream {id} has {turns} turns");
        assert!(!send.scheduled || turns == 1, "stream {id} waits for a turn that does not come");
        let blocked = queued > 0 && mux.data_sent == mux.data_allowed;
        assert!(!send.is_ready() || blocked || send.scheduled, "stream {id} has no turn");
    }
}

/// Checks that a frame that was decoded is the same after it is encoded.
fn check_encoding(frame: &Frame) {
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes);
    assert_eq!(Frame::decode(&mut bytes.freeze()).as_ref(), Ok(frame));
}

/// What the peer has received: the offset of each stream, and `None` once it has ended.
#[derive(Default)]
struct Sent(HashMap<u64, Option<u64>>);

impl Sent {
    /// Reads records as a peer would.
    fn read(&mut self, output: &mut BytesMut) {
        while let Some(mut record) = split_record(output).expect("records are in order") {
            while !record.is_empty() {
                self.take(Frame::decode(&mut record).expect("frames are in order"));
            }
        }
        assert!(output.is_empty(), "records are whole");
    }

    fn take(&mut self, frame: Frame) {
        match frame {
            Frame::Stream { id, offset, data, fin } => {
                let at = self.0.entry(id).or_insert(Some(0));
                assert_eq!(*at, Some(offset), "stream {id} continues at its offset");
                *at = (!fin).then_some(offset + data.len() as u64);
            }
            Frame::ResetStream { id, final_size, .. } => {
                let at = self.0.entry(id).or_insert(Some(0)).take();
                assert_eq!(at, Some(final_size), "stream {id} is reset at its offset");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of scripts that are tried.
    const SCRIPTS: u64 = 30_000;

    /// A stream on which the peer has sent something, if there is one: a wrong end of it breaks more
    /// rules than that of one that was never used.
    fn used(rng: &mut fastrand::Rng, offsets: &HashMap<u64, u64>) -> Option<u64> {
        let mut ids: Vec<_> = offsets.keys().copied().collect();
        ids.sort_unstable();
        rng.choice(ids)
    }

    /// Frames of a peer that uses a few streams, and breaks the protocol with them if it is wild.
    fn frames(rng: &mut fastrand::Rng, offsets: &mut HashMap<u64, u64>, wild: bool) -> Bytes {
        let mut bytes = BytesMut::new();
        for _ in 0..rng.u8(1..6) {
            // A server's peer opens the even ones; the others exist once this side has opened them.
            let id = if wild { rng.u64(..40) } else { rng.u64(..6) << 2 };
            let (code, limit) = (rng.u64(..9), rng.u64(..80_000));
            let frame = match rng.u8(..24) {
                0..=9 => {
                    let data = Bytes::from(vec![rng.u8(..); rng.usize(..300)]);
                    let next = offsets.entry(id).or_default();
                    let offset = std::mem::replace(next, *next + data.len() as u64);
                    Frame::Stream { id, offset, data, fin: false }
                }
                10 if wild => {
                    let id = used(rng, offsets).unwrap_or(id);
                    let final_size = if rng.bool() { limit } else { limit % 999 };
                    Frame::ResetStream { id, code, final_size }
                }
                11 if wild => {
                    let id = used(rng, offsets).unwrap_or(id);
                    Frame::Stream { id, offset: limit % 999, data: Bytes::new(), fin: true }
                }
                12 => Frame::StopSending { id, code },
                13 => Frame::MaxStreamData { id, limit },
                14 => Frame::MaxData(limit),
                15 => Frame::MaxStreams(rng.u64(..12)),
                16 => Frame::Ping(limit),
                17..=20 => Frame::Pong(rng.u64(..9)),
                _ => Frame::Nothing,
            };
            frame.encode(&mut bytes);
        }
        bytes.freeze()
    }

    /// A script whose peer sends whole records, and keeps to the protocol in half of the scripts.
    fn script(rng: &mut fastrand::Rng) -> Vec<u8> {
        let wild = rng.bool();
        let server = if wild { rng.u8(..) & SERVER } else { SERVER };
        let begun = if wild && rng.u8(..16) == 0 { 0 } else { BEGUN };
        let mut script = vec![server | begun | RECORDS];
        let mut offsets = HashMap::new();
        for _ in 0..rng.u8(1..60) {
            match rng.u8(..12) {
                0..=2 => {
                    let frames = frames(rng, &mut offsets, wild);
                    let [high, low] = (frames.len() as u16).to_be_bytes();
                    script.extend([0, high, low, 0]);
                    script.extend_from_slice(&frames);
                }
                step @ 4..=7 => script.extend([step, rng.u8(..), rng.u8(..), 0]),
                _ => script.extend([6, rng.u8(..), rng.u8(..), rng.u8(..)]),
            }
        }
        script
    }

    /// Breaks a script: a bit flips, a length changes, bytes are missing.
    fn mutate(rng: &mut fastrand::Rng, script: &mut Vec<u8>) {
        let position = rng.usize(..script.len());
        match rng.u8(..5) {
            0 | 1 => script[position] ^= 1 << rng.u8(..8),
            2 => script[position] = [0, 0x3f, 0x40, 0x80, 0xc0, 0xff][rng.usize(..6)],
            3 => script.truncate(position + 1),
            _ => drop(script.drain(position..(position + rng.usize(..9)).min(script.len() - 1))),
        }
    }

    #[test]
    fn invariants_hold_whatever_the_peer_sends() {
        let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| fastrand::u64(..));
        println!("SEED={seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut ended = HashMap::<String, u64>::new();
        for _ in 0..SCRIPTS {
            let mut script = script(&mut rng);
            for _ in 0..rng.u8(..4) {
                mutate(&mut rng, &mut script);
            }
            let label = match exercise(&script) {
                Ended::Fault(Fault::Frame(_)) => "Frame".into(),
                Ended::Fault(fault) => format!("{fault:?}"),
                ended => format!("{ended:?}"),
            };
            *ended.entry(label).or_default() += 1;
        }
        println!("{ended:?}");
        // Scripts get far, and reach every fault but the flood, which takes longer.
        assert!(ended.get("Script").is_some_and(|count| *count > SCRIPTS / 5), "{ended:?}");
        for fault in ["Frame", "Parameters", "Limit", "StreamId", "Offset", "AfterEnd", "FinalSize"]
        {
            assert!(ended.contains_key(fault), "{fault} was never reached: {ended:?}");
        }
    }
}
