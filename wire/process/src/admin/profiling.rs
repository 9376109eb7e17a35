//! Profiles on request, in the format of pprof.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use hyper::StatusCode;
use pprof::{ProfilerGuard, ProfilerGuardBuilder, protos::Message as _};
use tokio::time::sleep;

use super::AdminResponse;
use crate::{
    heap_profiles::{self, HeapProfileError},
    threads::on_thread,
};

/// Duration of a profile for which the request names none; that of Go.
const DEFAULT_DURATION: Duration = Duration::from_secs(30);
/// Maximum duration of a profile.
const MAX_DURATION: Duration = Duration::from_mins(1);
/// Samples per second of processor time. No multiple of what programs do every 10 ms.
const FREQUENCY: i32 = 99;

/// Whether a profile is being taken: the kernel has one timer for it in the process.
static TAKING: AtomicBool = AtomicBool::new(false);

/// Answers a request of a profile: with the profile, once it is complete, or with the fault. A
/// client that leaves ends the profile.
pub(super) async fn cpu(query: &str) -> AdminResponse {
    let duration = match duration(query) {
        Ok(duration) => duration,
        Err(fault) => return AdminResponse::text(StatusCode::BAD_REQUEST, fault),
    };
    if TAKING.swap(true, Ordering::Relaxed) {
        // Go's answer.
        let text = "Could not enable CPU profiling: cpu profiling already in use\n";
        return AdminResponse::text(StatusCode::INTERNAL_SERVER_ERROR, text);
    }
    let _taken = scopeguard::guard((), |()| TAKING.store(false, Ordering::Relaxed));
    match profile(duration).await {
        Ok(profile) => AdminResponse {
            content_type: "application/octet-stream",
            ..AdminResponse::text(StatusCode::OK, profile)
        },
        Err(error) => {
            let text = format!("Could not enable CPU profiling: {error}\n");
            AdminResponse::text(StatusCode::INTERNAL_SERVER_ERROR, text)
        }
    }
}

/// Answers a request of a profile of the memory in use: with the profile, or with the fault.
pub(super) async fn heap(query: &str) -> AdminResponse {
    if query.split('&').any(|pair| pair.starts_with("seconds=")) {
        let text = "seconds has no effect on what is in use now: take two profiles and compare \
                    them, as in go tool pprof -base FIRST SECOND\n";
        return AdminResponse::text(StatusCode::BAD_REQUEST, text);
    }
    match heap_profiles::take().await {
        Ok(profile) => AdminResponse {
            content_type: "application/octet-stream",
            ..AdminResponse::text(StatusCode::OK, profile)
        },
        Err(error) => AdminResponse::text(status(&error), format!("{error}\n")),
    }
}

fn status(error: &HeapProfileError) -> StatusCode {
    match error {
        HeapProfileError::NotBuilt => StatusCode::NOT_IMPLEMENTED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The duration that a query asks for with `seconds`, at most [`MAX_DURATION`].
fn duration(query: &str) -> Result<Duration, String> {
    let seconds = query.split('&').find_map(|pair| pair.strip_prefix("seconds="));
    let Some(seconds) = seconds else { return Ok(DEFAULT_DURATION) };
    let limit = MAX_DURATION.as_secs();
    match seconds.parse() {
        Ok(seconds) if (1..=limit).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("seconds must be a number from 1 to {limit}\n")),
    }
}

/// Samples all threads for this time. The runtime waits only: the begin and the end are worked on by
/// other threads.
async fn profile(duration: Duration) -> io::Result<Vec<u8>> {
    let begin = || ProfilerGuardBuilder::default().frequency(FREQUENCY).build();
    let guard = on_thread("profiler", begin).await?.map_err(io::Error::other)?;
    sleep(duration).await;
    on_thread("profiler", move || encoded(&guard)).await?.map_err(io::Error::other)
}

fn encoded(guard: &ProfilerGuard<'_>) -> pprof::Result<Vec<u8>> {
    Ok(guard.report().build()?.pprof()?.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_takes_a_minute_at_most() {
        assert_eq!(duration(""), Ok(DEFAULT_DURATION));
        assert_eq!(duration("debug=0&seconds=60"), Ok(MAX_DURATION));
        for query in ["seconds=", "seconds=0", "seconds=61", "seconds=-1", "seconds=x"] {
            assert!(duration(query).is_err(), "{query}");
        }
    }
}
