//! A splice that begins with a preamble from the other side.

use super::*;

/// Reads one byte, and refuses the splice if it is not 1.
struct Byte;

impl Preamble for Byte {
    async fn read(self, recv: &mut RecvHalf) -> Result<(), Cut> {
        let mut chunks = [Bytes::new()];
        recv.read_chunks(&mut chunks).await?;
        match chunks[0][..] {
            [1] => Ok(()),
            _ => Err(Cut::Preamble { code: CODE, reason: "no target".into() }),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn local_bytes_go_out_before_the_preamble_is_here() {
    let mut bench = Bench::with(Byte, Shared::default()).await;
    bench.send_local(b"early");
    assert_eq!(bench.read().await, Ok(Some("early".into())));
    bench.send_remote(&[1]).await;
    // Sent at once, it would be one chunk with what follows.
    sleep(Duration::from_secs(1)).await;
    bench.send_remote(b"then its bytes").await;
    bench.send.finish();
    bench.peer.ended.wait().await;
    assert_eq!(bench.received(), "then its bytes");
}

#[tokio::test(start_paused = true)]
async fn a_preamble_that_refuses_cuts_both_sides_off_with_its_code_and_reason() {
    let mut bench = Bench::with(Byte, Shared::default()).await;
    bench.send_remote(&[2]).await;
    let cut = bench.outcome().await.end.unwrap_err();
    assert_eq!((cut.code(), cut.to_string()), (CODE, "no target".into()));
    assert_eq!(bench.read().await, Err(ReadError::Reset(CODE)));
    assert_eq!(bench.aborts(), 1);
}
