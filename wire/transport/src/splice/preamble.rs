//! What precedes the bytes of a stream.

use super::Cut;
use crate::RecvHalf;

/// Bytes at the start of a stream that are not the local side's, such as the answer to a dial, and
/// that have not all arrived when the splice begins.
pub trait Preamble: Send {
    /// Reads the preamble off the stream, and nothing behind it.
    ///
    /// # Errors
    /// When the splice is to be cut off for what the preamble says.
    fn read(self, recv: &mut RecvHalf) -> impl Future<Output = Result<(), Cut>> + Send;
}

/// No preamble: the stream is at its first byte.
impl Preamble for () {
    async fn read(self, _recv: &mut RecvHalf) -> Result<(), Cut> {
        Ok(())
    }
}
