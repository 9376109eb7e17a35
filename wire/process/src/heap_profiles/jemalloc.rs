//! jemalloc and its profiler.

use std::io::{self, Read as _, Write as _};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use jemalloc_pprof::{JemallocProfCtl, PROF_CTL};
use pprof::protos::{Message as _, Profile};
use tikv_jemallocator::Jemalloc;

use super::HeapProfileError;

/// Pattern of the functions that belong to the allocator, for C code and for Rust.
const ALLOCATOR_FRAMES: &str = "malloc|calloc|realloc|posix_memalign|aligned_alloc|_rjem_.*|\
    prof_backtrace_impl|.*__rust_(alloc|alloc_zeroed|realloc)|.* as core::alloc::.*|alloc::alloc::.*";

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Settings with which jemalloc starts, with the end of a C string: able to sample one allocation
/// in 512 KiB (2^19), and not sampling. The variable `MALLOC_CONF` has precedence.
#[allow(unsafe_code, reason = "jemalloc documents this name, and that it is a pointer")]
#[unsafe(export_name = "malloc_conf")]
static SETTINGS: &[u8; 46] = b"prof:true,prof_active:false,lg_prof_sample:19\0";

pub(super) fn activate() -> Result<(), HeapProfileError> {
    with_profiler(|profiler| {
        profiler.activate().map_err(|error| HeapProfileError::Failed(error.into()))
    })
}

/// Blocks on a temporary file, and on allocations of other threads for a moment.
pub(super) fn profile() -> Result<Vec<u8>, HeapProfileError> {
    with_profiler(|profiler| {
        if !profiler.activated() {
            return Err(HeapProfileError::Inactive);
        }
        let profile =
            profiler.dump_pprof().map_err(|error| HeapProfileError::Failed(error.into()))?;
        without_allocator(&profile).map_err(|error| HeapProfileError::Failed(error.into()))
    })
}

/// The profile with the names of the allocator's functions, which pprof then leaves out: otherwise
/// all memory would be that of the innermost one.
fn without_allocator(profile: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    GzDecoder::new(profile).read_to_end(&mut bytes)?;
    let mut profile = Profile::decode(&*bytes).map_err(io::Error::other)?;
    profile.drop_frames = i64::try_from(profile.string_table.len()).unwrap_or_default();
    profile.string_table.push(ALLOCATOR_FRAMES.into());
    let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
    compressed.write_all(&profile.encode_to_vec())?;
    compressed.finish()
}

/// Does work with the one handle of the profiler, which is held for the time of a profile.
fn with_profiler<T>(
    work: impl FnOnce(&mut JemallocProfCtl) -> Result<T, HeapProfileError>,
) -> Result<T, HeapProfileError> {
    let profiler = PROF_CTL.as_ref().ok_or(HeapProfileError::Disabled)?;
    work(&mut *profiler.try_lock().map_err(|_| HeapProfileError::InUse)?)
}
