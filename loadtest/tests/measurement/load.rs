//! Every kind of session against its target, without a tunnel.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use culvert_loadtest::{
    load::{Exchange, Kind, Plan, Sample, Workload, drive::drive, service::Service},
    targets::Target,
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc::unbounded_channel,
};

#[rstest]
#[tokio::test]
async fn a_session_does_what_its_kind_is_for(
    #[values(
        Kind::Echo,
        Kind::Download,
        Kind::Upload,
        Kind::CheckedDownload,
        Kind::CheckedUpload,
        Kind::Fetch,
        Kind::Send,
        Kind::Request,
        Kind::Exchange,
        Kind::ShortConnection,
        Kind::Tail,
        Kind::Dial,
        Kind::WriteClose,
        Kind::HalfClose,
        Kind::Abandon,
        Kind::Greeting,
        Kind::Stall,
        Kind::Idle
    )]
    kind: Kind,
) {
    const SECONDS: f64 = 1.0;
    let service = Service::start("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let target = (kind == Kind::Greeting).then(|| service.greeter().to_string());
    let name = format!("{kind:?}");
    let mut exchanges = Vec::new();
    if matches!(kind, Kind::Exchange | Kind::ShortConnection) {
        exchanges = [(300, 3000), (1500, 4000)].map(exchange).to_vec();
    }
    let workload =
        Workload { name, kind, target, sessions: 2, size: 100, interval_ms: 5.0, exchanges };
    let workloads = vec![workload];
    let plan = Plan { seconds: SECONDS, target: service.address().to_string(), workloads };
    let (sender, mut receiver) = unbounded_channel();
    drive(plan, None, sender).await;
    let mut samples = Vec::new();
    receiver.recv_many(&mut samples, usize::MAX).await;
    assert!(matches!(samples.first(), Some(Sample::Start(_))));
    assert!(matches!(samples.last(), Some(Sample::Done(_))));
    let errors: Vec<_> = samples.iter().filter(|s| matches!(s, Sample::Error(..))).collect();
    assert!(errors.is_empty(), "{errors:?}");
    let latencies = samples.iter().filter(|s| matches!(s, Sample::Latency(..))).count();
    let bytes: u64 =
        samples.iter().map(|s| if let Sample::Bytes(_, _, bytes) = s { *bytes } else { 0 }).sum();
    match kind {
        Kind::Exchange | Kind::ShortConnection => {
            assert!((40..=402).contains(&latencies), "{latencies}");
            // All bytes of every answer, and at the end a part of those that are not complete.
            let answers = latencies as u64 * 7000;
            assert!(bytes >= answers, "{bytes} bytes of {latencies} answers");
        }
        Kind::Download | Kind::CheckedDownload => assert!(bytes > 1_000_000, "{bytes}"),
        Kind::Upload | Kind::CheckedUpload => {
            assert!(service.uploaded() > 1_000_000, "{}", service.uploaded())
        }
        Kind::Stall | Kind::Idle => assert_eq!(latencies, 0),
        // Two sessions, every 5 ms: 402 and never more; a tenth of that on a busy machine.
        _ => assert!((40..=402).contains(&latencies), "{latencies}"),
    }
    assert_eq!((service.short(), service.corrupt()), (0, 0));
}

/// A workload of one session.
fn workload(kind: Kind, size: u64, interval_ms: f64) -> Workload {
    let (name, exchanges) = (format!("{kind:?}"), Vec::new());
    Workload { name, kind, target: None, sessions: 1, size, interval_ms, exchanges }
}

/// Samples of one workload against this target.
async fn samples(target: &Target, seconds: f64, workload: Workload) -> Vec<Sample> {
    let plan = Plan { seconds, target: target.address().to_string(), workloads: vec![workload] };
    let (sender, mut receiver) = unbounded_channel();
    drive(plan, None, sender).await;
    let mut samples = Vec::new();
    receiver.recv_many(&mut samples, usize::MAX).await;
    samples
}

/// Times, in microseconds, and texts of the errors.
fn errors(samples: &[Sample]) -> Vec<(u64, &str)> {
    let errors = samples.iter().filter_map(|sample| match sample {
        Sample::Error(_, at, text) => Some((*at, text.as_str())),
        _ => None,
    });
    errors.collect()
}

/// Size of a message of the echo.
const MESSAGE: usize = 64;

#[derive(Clone, Copy, Debug)]
enum Fault {
    Lost,
    Doubled,
    Swapped,
    MessageLost,
    MessageDoubled,
    MessagesSwapped,
}

/// The bytes of four messages with a fault in the second.
fn faulty(fault: Fault, mut bytes: Vec<u8>) -> Vec<u8> {
    let at = MESSAGE + 10;
    let second = MESSAGE..2 * MESSAGE;
    match fault {
        Fault::Lost => drop(bytes.remove(at)),
        Fault::Doubled => bytes.insert(at, bytes[at]),
        Fault::Swapped => {
            // Equal neighbours have no order.
            let at = (at..).find(|at| bytes[*at] != bytes[*at + 1]).unwrap();
            bytes.swap(at, at + 1);
        }
        Fault::MessageLost => drop(bytes.drain(second)),
        Fault::MessageDoubled => drop(bytes.splice(MESSAGE..MESSAGE, bytes[second].to_vec())),
        Fault::MessagesSwapped => bytes[MESSAGE..3 * MESSAGE].rotate_left(MESSAGE),
    }
    bytes
}

/// The first connection has the fault, and the next is served as it should.
#[rstest]
#[tokio::test]
async fn an_echo_with_bytes_that_were_not_sent_there_is_one_error_and_no_hang(
    #[values(
        Fault::Lost,
        Fault::Doubled,
        Fault::Swapped,
        Fault::MessageLost,
        Fault::MessageDoubled,
        Fault::MessagesSwapped
    )]
    fault: Fault,
) {
    let connections = Arc::new(AtomicUsize::new(0));
    let target = Target::start(move |mut socket| {
        let first = connections.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            assert_eq!(socket.read_u8().await?, b'E');
            if first {
                let mut bytes = vec![0; 4 * MESSAGE];
                socket.read_exact(&mut bytes).await?;
                socket.write_all(&faulty(fault, bytes)).await?;
            }
            let (mut reader, mut writer) = socket.split();
            tokio::io::copy(&mut reader, &mut writer).await.map(drop)
        }
    })
    .await
    .unwrap();
    let samples = samples(&target, 1.0, workload(Kind::Echo, MESSAGE as u64, 10.0)).await;
    let [(_, error)] = errors(&samples)[..] else { panic!("{samples:?}") };
    assert_eq!(error, "the bytes differ from what was sent");
    let answers = samples.iter().filter(|sample| matches!(sample, Sample::Latency(..)));
    assert!(answers.count() > 5, "it goes on: {samples:?}");
}

/// The target cuts the first connection after an answer and a pause, and the second before any
/// answer: both are one gap, whose begin is the oldest message without an answer.
#[tokio::test]
async fn a_session_that_is_cut_has_one_gap_until_its_next_answer() {
    const PAUSE: Duration = Duration::from_millis(150);
    let connections = Arc::new(AtomicUsize::new(0));
    let target = Target::start(move |mut socket| {
        let number = connections.fetch_add(1, Ordering::Relaxed);
        async move {
            let mut message = [0; MESSAGE];
            assert_eq!(socket.read_u8().await?, b'E');
            if number < 2 {
                socket.read_exact(&mut message).await?;
                if number == 0 {
                    socket.write_all(&message).await?;
                    tokio::time::sleep(PAUSE).await;
                }
                return Ok(());
            }
            let (mut reader, mut writer) = socket.split();
            tokio::io::copy(&mut reader, &mut writer).await.map(drop)
        }
    })
    .await
    .unwrap();
    let samples = samples(&target, 1.5, workload(Kind::Echo, MESSAGE as u64, 20.0)).await;
    let [(cut, _), (cut_again, _)] = errors(&samples)[..] else { panic!("{samples:?}") };
    let answers = samples.iter().filter_map(|sample| match sample {
        Sample::Latency(_, due, took) => Some((*due, *took)),
        _ => None,
    });
    let answers: Vec<_> = answers.collect();
    // The gap ends with the third connection's first answer.
    let [first, gap, next, ..] = answers[..] else { panic!("{answers:?}") };
    assert!(first.0 < gap.0 && gap.0 < cut, "since the oldest message: {samples:?}");
    let (gap_end, answered) = (gap.0 + gap.1, next.0 + next.1);
    assert!(cut_again < next.0 && next.0 <= gap_end && gap_end <= answered + 1, "{samples:?}");
    let longest = answers.iter().map(|(_, took)| *took).max();
    assert_eq!(longest, Some(gap.1));
}

#[tokio::test]
async fn a_session_that_is_cut_and_not_served_again_is_overdue_since_its_oldest_message() {
    let connections = Arc::new(AtomicUsize::new(0));
    let target = Target::start(move |mut socket| {
        let first = connections.fetch_add(1, Ordering::Relaxed) == 0;
        async move {
            let mut message = [0; MESSAGE];
            assert_eq!(socket.read_u8().await?, b'E');
            socket.read_exact(&mut message).await?;
            if !first {
                std::future::pending::<()>().await;
            }
            Ok(())
        }
    })
    .await
    .unwrap();
    let samples = samples(&target, 1.0, workload(Kind::Echo, MESSAGE as u64, 20.0)).await;
    let [(cut, _)] = errors(&samples)[..] else { panic!("{samples:?}") };
    let waited = samples.iter().filter_map(|sample| match sample {
        Sample::Overdue(_, _, waited) => Some(*waited),
        _ => None,
    });
    // From the first message on, although its connection ended long before.
    assert!(waited.max().unwrap() >= 1_000_000 - cut, "{samples:?}");
}

#[tokio::test]
async fn a_checked_download_with_another_byte_is_an_error() {
    let target = Target::start(|mut socket| async move {
        assert_eq!(socket.read_u8().await?, b'P');
        socket.read_u64().await?;
        socket.write_all(&[0; 100_000]).await
    })
    .await
    .unwrap();
    let samples = samples(&target, 0.5, workload(Kind::CheckedDownload, 0, 0.0)).await;
    assert_eq!(errors(&samples)[0].1, "the bytes differ from what was sent");
}

/// The target counts the upload, and ends the connection so that the session has an error too.
#[tokio::test]
async fn a_checked_upload_with_another_byte_is_counted_and_ended() {
    let service = Service::start("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let mut upload = TcpStream::connect(service.address()).await.unwrap();
    upload.write_all(&[&b"V"[..], &7_u64.to_be_bytes(), &[0; 100]].concat()).await.unwrap();
    // An end or a reset: the target has not read all.
    let ended = upload.read_u8().await;
    assert!(ended.is_err(), "{ended:?}");
    assert_eq!((service.corrupt(), service.uploaded()), (1, 0));
}

fn exchange((request, answer): (u64, u64)) -> Exchange {
    Exchange { request, answer }
}

/// The target answers each request half an interval late, so every other one is left out, and no
/// request waits for another.
#[tokio::test]
async fn an_exchange_that_comes_due_before_the_last_was_answered_is_left_out() {
    const INTERVAL_MS: u64 = 40;
    let target = Target::start(|mut socket| async move {
        assert_eq!(socket.read_u8().await?, b'X');
        let mut request = [0; 512];
        loop {
            socket.read_exact(&mut request).await?;
            let sizes = [&request[..8], &request[8..16]].map(|size| size[7]);
            assert_eq!((request[6], sizes), (2, [0, 100]));
            tokio::time::sleep(Duration::from_millis(INTERVAL_MS * 3 / 2)).await;
            socket.write_all(&[0; 100]).await?;
        }
    })
    .await
    .unwrap();
    let exchanges = vec![exchange((512, 100))];
    let workload = Workload { exchanges, ..workload(Kind::Exchange, 0, INTERVAL_MS as f64) };
    let samples = samples(&target, 1.0, workload).await;
    let answers = samples.iter().filter_map(|sample| match sample {
        Sample::Latency(_, due, took) => Some((*due, *took)),
        _ => None,
    });
    let answers: Vec<_> = answers.collect();
    assert!(answers.len() > 2, "{samples:?}");
    for pair in answers.windows(2) {
        let [(due, took), (next, _)] = [pair[0], pair[1]];
        // Timers fire up to a millisecond late.
        assert!(next - due >= 2 * INTERVAL_MS * 1000 - 2000, "{due} and {next}");
        assert!(took >= INTERVAL_MS * 1500, "{took}");
        assert!(next >= due + took, "{next} came due before {due} was answered");
    }
}
