//! A million broken frames through every decoder that a peer can reach.
//!
//! Set `SEED` to the number that a failure printed to see it again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(unsafe_code)] // A counting allocator is the only witness of what a decoder allocates.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use culvert_wire::{
    codec::MAX_BODY_LEN,
    control::ControlMessage,
    dial::{DialReply, DialRequest},
    frame::{self, Frame, FrameError, HEAD_LEN},
    resume::{ResumeReply, ResumeRequest},
};

use common::{Message, examples, first_frame, hex};

/// How many frames are tried.
const FRAMES: u64 = 1_000_000;
/// The most bytes that one decoding may hold at once: the text of a whole body, once more for what
/// a lying length claims, and the items of full lists.
const MAX_HELD: isize = 4 * MAX_BODY_LEN as isize;

/// The system's allocator, counting what each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST_HELD: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    HELD.set(HELD.get() + bytes);
    MOST_HELD.set(MOST_HELD.get().max(HELD.get()));
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator unchanged, and counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What `decode` returns, and the most bytes it held meanwhile.
fn measured<T>(decode: impl FnOnce() -> T) -> (T, isize) {
    let before = HELD.get();
    MOST_HELD.set(before);
    let result = decode();
    (result, MOST_HELD.get() - before)
}

/// Breaks a frame as bytes can break: flipped, cut, moved, overwritten.
fn mutate(rng: &mut fastrand::Rng, bytes: &mut Vec<u8>) {
    match rng.u8(..7) {
        0 => flip(rng, bytes),
        1 => bytes.truncate(rng.usize(..=bytes.len())),
        2 => {
            let position = rng.usize(..=bytes.len());
            let run = vec![rng.u8(..); rng.usize(1..20)];
            bytes.splice(position..position, run);
        }
        // The marks of wide integers, where a length or a number may be.
        3 => replace(rng, bytes, &[rng_mark]),
        // A false length: a mark and a large number.
        4 => replace(rng, bytes, &[rng_mark, any, any, any, any]),
        5 => {
            let from = rng.usize(..=bytes.len());
            let to = rng.usize(from..=bytes.len());
            bytes.drain(from..to.min(from + 20));
        }
        // The head's length, however much follows.
        _ => {
            if let Some(length) = bytes.get_mut(1..HEAD_LEN) {
                length.copy_from_slice(&rng.u16(..).to_be_bytes());
            }
        }
    }
}

fn flip(rng: &mut fastrand::Rng, bytes: &mut [u8]) {
    if !bytes.is_empty() {
        let position = rng.usize(..bytes.len());
        bytes[position] ^= 1 << rng.u8(..8);
    }
}

fn rng_mark(rng: &mut fastrand::Rng) -> u8 {
    rng.u8(251..)
}

fn any(rng: &mut fastrand::Rng) -> u8 {
    rng.u8(..)
}

/// Overwrites bytes from somewhere on with those that `values` draw.
fn replace(rng: &mut fastrand::Rng, bytes: &mut [u8], values: &[fn(&mut fastrand::Rng) -> u8]) {
    let position = rng.usize(..=bytes.len());
    for (byte, value) in bytes[position..].iter_mut().zip(values) {
        *byte = value(rng);
    }
}

/// Makes the head announce the body's length, so that the body is decoded.
fn mend_length(bytes: &mut [u8]) {
    let length = u16::try_from(bytes.len().saturating_sub(HEAD_LEN)).unwrap_or(u16::MAX);
    if let Some(announced) = bytes.get_mut(1..HEAD_LEN) {
        announced.copy_from_slice(&length.to_be_bytes());
    }
}

/// Checks that the frame is not read as an `M` unless it is of that kind.
fn refuses<M: frame::Message + std::fmt::Debug + PartialEq>(frame: &Frame) {
    if frame.kind != M::KIND {
        let refused = FrameError::UnexpectedKind { found: frame.kind, expected: M::KIND };
        assert_eq!(frame.message::<M>(), Err(refused));
    }
}

#[test]
fn broken_frames_are_refused_within_limits() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let frames: Vec<_> =
        examples().iter().map(|example| example.message.encode().unwrap()).collect();
    let (mut read, mut most) = (0_u64, 0);
    let mut bytes = Vec::new();
    for _ in 0..FRAMES {
        bytes.clear();
        bytes.extend_from_slice(&frames[rng.usize(..frames.len())]);
        for _ in 0..rng.u8(1..4) {
            mutate(&mut rng, &mut bytes);
        }
        if rng.u8(..8) > 0 {
            mend_length(&mut bytes);
        }
        let Some(frame) = first_frame(&bytes) else { continue };
        let (result, held) = measured(|| Message::decode(&frame));
        assert!(held <= MAX_HELD, "SEED={seed}: {held} bytes held for {}", hex(&bytes));
        most = most.max(held);
        // The decoders of other messages refuse it by its kind.
        if (0x10..=0x1f).contains(&frame.kind) {
            let control = ControlMessage::decode(&frame);
            assert!(matches!(control, Err(FrameError::UnexpectedKind { .. })), "SEED={seed}");
        }
        refuses::<DialRequest>(&frame);
        refuses::<DialReply>(&frame);
        refuses::<ResumeRequest>(&frame);
        refuses::<ResumeReply>(&frame);
        let Ok(message) = result else { continue };
        read += 1;
        if let Message::Control(ControlMessage::Unknown { .. }) = message {
            continue;
        }
        let again = message.encode().unwrap();
        assert!(again.len() <= bytes.len(), "SEED={seed}: longer than {}", hex(&bytes));
        let again = Message::decode(&first_frame(&again).unwrap());
        assert_eq!(again.as_ref(), Ok(&message), "SEED={seed}: {}", hex(&bytes));
    }
    println!("{read} of {FRAMES} frames were read, with at most {most} bytes held for one");
    assert!(read > FRAMES / 100, "the mutations break everything: {read}");
}
