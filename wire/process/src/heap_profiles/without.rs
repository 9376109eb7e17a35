//! The C library's allocator.

use super::HeapProfileError;

pub(super) fn activate() -> Result<(), HeapProfileError> {
    Err(HeapProfileError::NotBuilt)
}

pub(super) fn profile() -> Result<Vec<u8>, HeapProfileError> {
    Err(HeapProfileError::NotBuilt)
}
