//! Profiles of the memory in use, which builds with the feature `heap-profiles` can take.
//!
//! Those builds have jemalloc as their allocator, for C code too. It samples allocations from
//! [`activate`] on, so what was allocated before is in no profile. All other builds have the C
//! library's allocator, which cannot sample.

#[cfg(feature = "heap-profiles")]
#[path = "heap_profiles/jemalloc.rs"]
mod allocator;
#[cfg(not(feature = "heap-profiles"))]
#[path = "heap_profiles/without.rs"]
mod allocator;

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{cli::BoxError, threads::on_thread};

/// Why there is no heap profile.
#[derive(Debug, thiserror::Error)]
pub enum HeapProfileError {
    /// The build has an allocator that cannot sample.
    #[error(
        "this build takes no heap profiles: one that was built with \
         --features heap-profiles does, and a preloaded allocator can"
    )]
    NotBuilt,
    /// The allocator was started without its profiler, as by a `MALLOC_CONF` with `prof:false`.
    #[error("the allocator was started without its profiler: MALLOC_CONF may have prof:false")]
    Disabled,
    /// Nothing has activated the sampling.
    #[error("allocations are not sampled: --enable-profiling activates it")]
    Inactive,
    /// Another profile is being taken.
    #[error("another heap profile is being taken")]
    InUse,
    /// No thread could be started.
    #[error("no thread for the heap profile: {0}")]
    Thread(#[source] io::Error),
    /// The allocator or the encoding failed, as where no temporary file can be written.
    #[error("cannot take the heap profile: {0}")]
    Failed(#[source] BoxError),
}

/// Whether a profile is being taken.
static TAKING: AtomicBool = AtomicBool::new(false);

/// Samples allocations from now on, one for about 512 KiB.
///
/// # Errors
/// [`HeapProfileError::NotBuilt`], and the allocator's.
pub fn activate() -> Result<(), HeapProfileError> {
    allocator::activate()
}

/// The sampled memory that is in use now, in pprof's format, compressed. One profile is taken at a
/// time, on a thread of its own. Panics outside a tokio runtime.
///
/// # Errors
/// All of [`HeapProfileError`].
///
/// # Cancel safety
/// Cancel safe: a profile that has begun is completed, and none begins before.
pub async fn take() -> Result<Vec<u8>, HeapProfileError> {
    if TAKING.swap(true, Ordering::Relaxed) {
        return Err(HeapProfileError::InUse);
    }
    let turn = scopeguard::guard((), |()| TAKING.store(false, Ordering::Relaxed));
    let work = move || {
        let _turn = turn; // ends with the work and not with the request
        allocator::profile()
    };
    on_thread("heap-profiler", work).await.map_err(HeapProfileError::Thread)?
}

#[cfg(all(test, feature = "heap-profiles"))]
mod tests {
    use std::{future::poll_fn, io::Read as _, task::Poll};

    use flate2::read::GzDecoder;

    use super::*;

    /// Text of a profile, with the names of functions.
    fn text(profile: &[u8]) -> String {
        let mut bytes = Vec::new();
        GzDecoder::new(profile).read_to_end(&mut bytes).expect("a profile is compressed");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[inline(never)]
    fn sixty_four_mebibytes() -> Vec<Vec<u8>> {
        (0..64).map(|_| std::hint::black_box(vec![1; 1 << 20])).collect()
    }

    // One test: the allocator is the process's.
    #[tokio::test]
    async fn a_profile_names_who_has_memory_from_the_activation_on_and_one_is_taken_at_a_time() {
        assert!(matches!(take().await, Err(HeapProfileError::Inactive)));
        activate().unwrap();
        activate().unwrap();
        let held = sixty_four_mebibytes();
        let profile = text(&take().await.unwrap());
        assert!(profile.contains("sixty_four_mebibytes"), "{} bytes", profile.len());
        drop(held);
        let profile = text(&take().await.unwrap());
        assert!(!profile.contains("sixty_four_mebibytes"), "what was freed is still in it");

        // A request that leaves keeps its turn until its profile is complete.
        let mut first = Box::pin(take());
        poll_fn(|context| {
            assert!(first.as_mut().poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
        let second = take().await;
        drop(first);
        assert!(matches!(second, Err(HeapProfileError::InUse)), "{second:?}");
        while matches!(take().await, Err(HeapProfileError::InUse)) {}
    }
}
