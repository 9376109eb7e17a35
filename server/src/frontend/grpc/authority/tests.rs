use std::convert::Infallible;

use http::uri::Authority;
use http_body_util::Empty;
use hyper::{Response, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};

use super::*;
use crate::http2_frames::{HEAD_LEN, kind::HEADERS};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// What grpc-go sends: `:method POST`, `:scheme http`, `:path` and `:authority` to be indexed.
fn grpc_go_fields(authority: &[u8]) -> Vec<u8> {
    let mut fields = vec![0x83, 0x86, 0x44, 1, b'/', 0x41];
    fields.push(u8::try_from(authority.len()).unwrap());
    fields.extend_from_slice(authority);
    fields
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn pass(input: &[u8]) -> Vec<u8> {
    let mut output = BytesMut::new();
    Frames::default().push(input, &mut output);
    output.to_vec()
}

fn session(frames: &[Vec<u8>]) -> Vec<u8> {
    [PREFACE, &frames.concat()].concat()
}

/// Decodes the fields of the HEADERS frames that come out, with one decoder for all.
fn authorities(bytes: &[u8]) -> Vec<String> {
    let mut decoder = loona_hpack::Decoder::new();
    let mut found = Vec::new();
    let mut rest = &bytes[PREFACE.len()..];
    while !rest.is_empty() {
        let length = usize::from(rest[1]) << 8 | usize::from(rest[2]);
        if rest[3] == HEADERS {
            for (name, value) in decoder.decode(&rest[HEAD_LEN..HEAD_LEN + length]).unwrap() {
                if name == b":authority" {
                    found.push(String::from_utf8(value).unwrap());
                }
            }
        }
        rest = &rest[HEAD_LEN + length..];
    }
    found
}

#[test]
fn an_escaped_path_becomes_as_many_legal_characters() {
    let fields = grpc_go_fields(b"%2Frun%2Fauth.sock");
    let input = session(&[frame(HEADERS, END_HEADERS, 1, &fields)]);
    let output = pass(&input);
    assert_eq!(output.len(), input.len());
    assert_eq!(authorities(&output), ["-2Frun-2Fauth.sock"]);
}

#[test]
fn a_huffman_coded_value_is_replaced_by_one_spelt_out() {
    // "www.example.com" of RFC 7541 C.4.1, with its first character made a `%`.
    let mut fields = vec![0x83, 0x41];
    let mut encoder_output = Vec::new();
    // %: 010101 (6 bits), 2: 00010 (5 bits), F: 1100001 (7 bits): "%2F" is 18 bits, padded by ones.
    let bits: u32 = 0b01_0101_0001_0110_0001 << 6 | 0b11_1111;
    encoder_output.extend_from_slice(&bits.to_be_bytes()[1..]);
    fields.push(0x80 | 3);
    fields.extend_from_slice(&encoder_output);
    let output = pass(&session(&[frame(HEADERS, END_HEADERS, 1, &fields)]));
    assert_eq!(authorities(&output), ["-2F"]);
}

#[test]
fn a_value_that_is_referred_to_later_was_made_legal_before() {
    let first = frame(HEADERS, END_HEADERS, 1, &grpc_go_fields(b"%2Fa%2Fb"));
    // 62 is the newest entry of the dynamic table: the authority that was just added.
    let second = frame(HEADERS, END_HEADERS, 3, &[0x83, 0x80 | 62]);
    assert_eq!(authorities(&pass(&session(&[first, second]))), ["-2Fa-2Fb", "-2Fa-2Fb"]);
}

#[test]
fn a_legal_authority_and_every_other_frame_pass_unchanged() {
    let input = session(&[
        frame(0x4, 0, 0, &[]),
        frame(HEADERS, END_HEADERS, 1, &grpc_go_fields(b"localhost:8090")),
        frame(0x0, 0, 1, &[7; 70_000]),
        frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x00, 1, b'a', 1, b'b']),
        frame(0x8, 0, 0, &[0, 0, 0, 9]),
    ]);
    assert_eq!(pass(&input), input);
}

#[test]
fn padding_and_priority_stay_where_they_are() {
    let fields = grpc_go_fields(b"%2Fx");
    let payload = [&[3, 0, 0, 0, 0, 16][..], &fields, &[0, 0, 0]].concat();
    let input = frame(HEADERS, END_HEADERS | PADDED | PRIORITY, 1, &payload);
    let output = pass(&session(&[input]));
    let fields = grpc_go_fields(b"-2Fx");
    let payload = [&[3, 0, 0, 0, 0, 16][..], &fields, &[0, 0, 0]].concat();
    let expected = frame(HEADERS, END_HEADERS | PADDED | PRIORITY, 1, &payload);
    assert_eq!(output, session(&[expected]));
}

#[test]
fn a_long_value_keeps_its_length_on_both_sides_of_the_length_codes_step() {
    for length in [126, 127, 128, 254, 255, 300] {
        let mut fields = vec![0x41];
        let mut text = vec![b'%'; length];
        text[0] = b'a';
        headers_test_append(&text, &mut fields);
        let output = pass(&session(&[frame(HEADERS, END_HEADERS, 1, &fields)]));
        assert_eq!(authorities(&output), [format!("a{}", "-".repeat(length - 1))]);
    }
}

/// A string spelt out, for tests: lengths below 127 + 128 in the plain way, others in two bytes.
fn headers_test_append(text: &[u8], out: &mut Vec<u8>) {
    match text.len() {
        short @ ..127 => out.push(u8::try_from(short).unwrap()),
        long => {
            let rest = long - 127;
            out.push(127);
            if rest < 128 {
                out.push(u8::try_from(rest).unwrap());
            } else {
                out.push(0x80 | u8::try_from(rest & 0x7f).unwrap());
                out.push(u8::try_from(rest >> 7).unwrap());
            }
        }
    }
    out.extend_from_slice(text);
}

#[test]
fn what_cannot_be_understood_is_left_for_h2_to_refuse() {
    for payload in [
        &[0x41][..],                                 // no value
        &[0x41, 0x7f],                               // no end of the length
        &[0x41, 0x05, b'%'],                         // shorter than its length
        &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], // an endless integer
        &[0x41, 0x81, 0x00],                         // no Huffman code
    ] {
        let input = session(&[frame(HEADERS, END_HEADERS, 1, payload)]);
        assert_eq!(pass(&input), input, "{payload:?}");
    }
    let input = session(&[frame(HEADERS, END_HEADERS | PADDED, 1, &[200, 0x83])]);
    assert_eq!(pass(&input), input, "more padding than payload");
}

proptest! {
    #[test]
    fn a_cut_anywhere_changes_nothing(cuts in prop::collection::vec(0_usize..600, 0..8)) {
        let input = session(&[
            frame(0x4, 0, 0, &[0; 12]),
            frame(HEADERS, END_HEADERS, 1, &grpc_go_fields(b"%2Frun%2Fx.sock")),
            frame(0x0, 0, 1, &[7; 400]),
            frame(HEADERS, END_HEADERS, 3, &[0x83, 0x80 | 62]),
        ]);
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(input.len())).collect();
        cuts.extend([0, input.len()]);
        cuts.sort_unstable();
        let (mut frames, mut output) = (Frames::default(), BytesMut::new());
        for part in cuts.windows(2) {
            frames.push(&input[part[0]..part[1]], &mut output);
        }
        prop_assert_eq!(&output[..], &pass(&input)[..]);
    }

    #[test]
    fn every_byte_of_any_frames_comes_out_and_headers_come_out_legal(
        frames in prop::collection::vec(any_frame(), 0..8), end in 0_usize..4000,
    ) {
        let whole = session(&frames);
        prop_assert_eq!(pass(&whole), expected(&whole));
        let cut = &whole[..end.min(whole.len())];
        prop_assert_eq!(pass(cut), expected(cut));
    }

    #[test]
    fn every_byte_that_is_no_frame_comes_out(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let input = [PREFACE, &bytes].concat();
        prop_assert_eq!(pass(&input), expected(&input));
    }

    #[test]
    fn fields_mean_the_same_but_for_an_authority_that_is_illegal(
        values in prop::collection::vec(any::<Vec<u8>>(), 0..6), authority in "[a-z%/]{1,40}",
    ) {
        let mut fields: Vec<_> =
            values.into_iter().map(|value| (b"name".to_vec(), value)).collect();
        fields.insert(fields.len() / 2, (b":authority".to_vec(), authority.into_bytes()));
        let encoded = loona_hpack::Encoder::new()
            .encode(fields.iter().map(|(name, value)| (&name[..], &value[..])));
        let output = pass(&session(&[frame(HEADERS, END_HEADERS, 1, &encoded)]));
        let decoded = loona_hpack::Decoder::new().decode(&output[PREFACE.len() + HEAD_LEN..]);
        for (name, value) in &mut fields {
            if name == b":authority" && Authority::try_from(&value[..]).is_err() {
                value.iter_mut().filter(|byte| b"%/".contains(byte)).for_each(|byte| *byte = b'-');
            }
        }
        prop_assert_eq!(decoded.unwrap(), fields);
    }

    #[test]
    fn mutated_requests_come_out_whole(at in 0_usize..60, byte: u8) {
        let mut input = session(&[frame(HEADERS, END_HEADERS, 1, &grpc_go_fields(b"%2Fx"))]);
        let at = at % input.len();
        input[at] = byte;
        prop_assert_eq!(pass(&input), expected(&input));
    }
}

/// A frame of any kind, with fields that are legal, illegal or no fields at all.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..600),
        Just(grpc_go_fields(b"%2Frun%2Fx.sock")),
        Just(grpc_go_fields(b"localhost:8090")),
    ];
    let kind = prop_oneof![Just(HEADERS), 0_u8..10];
    (kind, any::<u8>(), payload).prop_map(|(kind, flags, payload)| frame(kind, flags, 1, &payload))
}

/// What is to come out of these bytes: all of them, HEADERS frames made legal; but neither a
/// HEADERS frame nor a head that is not whole.
fn expected(input: &[u8]) -> Vec<u8> {
    let (preface, mut rest) = input.split_at(input.len().min(PREFACE.len()));
    let mut output = preface.to_vec();
    while let Some([high, middle, low, kind, ..]) = rest.first_chunk::<HEAD_LEN>().copied() {
        let length = u32::from_be_bytes([0, high, middle, low]) as usize;
        let (frame, behind) = rest.split_at(rest.len().min(HEAD_LEN + length));
        if kind != HEADERS || !(1..=MAX_FRAME_LEN).contains(&length) {
            output.extend_from_slice(frame);
        } else if frame.len() == HEAD_LEN + length {
            output.extend_from_slice(&headers::legalized(frame));
        }
        rest = behind;
    }
    output
}

/// Serves HTTP/2 on one end of a pipe; the first bytes of the answer to a request whose authority
/// is a Unix socket's path.
async fn answer<S>(wrap: impl FnOnce(DuplexStream) -> S) -> Vec<u8>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut client, server) = duplex(64 * 1024);
    let io = TokioIo::new(wrap(server));
    let service =
        service_fn(|_| async { Ok::<_, Infallible>(Response::new(Empty::<bytes::Bytes>::new())) });
    culvert_transport::test_util::detached(
        http2::Builder::new(TokioExecutor::new()).serve_connection(io, service),
    );
    let fields = grpc_go_fields(b"%2Frun%2Fauth.sock");
    let request =
        session(&[frame(0x4, 0, 0, &[]), frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields)]);
    client.write_all(&request).await.unwrap();
    // The frame on stream 1 that answers: HEADERS or RST_STREAM.
    loop {
        let mut head = [0; HEAD_LEN];
        client.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        client.read_exact(&mut payload).await.unwrap();
        if head[8] == 1 {
            return [&head[..], &payload].concat();
        }
    }
}

#[tokio::test]
async fn h2_alone_refuses_what_grpc_go_sends_over_a_unix_socket() {
    let answer = answer(|io| io).await;
    assert_eq!(answer[3], 0x3, "RST_STREAM");
    assert_eq!(answer[HEAD_LEN..], [0, 0, 0, 1], "PROTOCOL_ERROR");
}

#[tokio::test]
async fn h2_behind_this_serves_what_grpc_go_sends_over_a_unix_socket() {
    let answer = answer(legalized).await;
    assert_eq!(answer[3], HEADERS);
    assert_eq!(answer[HEAD_LEN], 0x88, ":status 200");
}
