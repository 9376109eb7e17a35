//! Readiness of a server, in the words of Konnectivity's.

use culvert_process::admin::AdminResponse;
use hyper::StatusCode;

/// The answer to `/readyz`: 200 `ok`, or 500 from the first signal to stop until the end, while no
/// frontend reaches the server, and while no agent is connected.
pub(crate) fn readiness(
    is_draining: bool,
    frontend_fault: Option<&'static str>,
    has_backend: bool,
) -> AdminResponse {
    let fault = match frontend_fault {
        _ if is_draining => "the server drains",
        Some(fault) => fault,
        None if !has_backend => "no connection to any proxy agent",
        None => return AdminResponse::text(StatusCode::OK, "ok"),
    };
    AdminResponse::text(StatusCode::INTERNAL_SERVER_ERROR, fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_ready_while_frontends_reach_it_and_an_agent_is_connected() {
        assert_eq!(readiness(false, None, true), AdminResponse::text(StatusCode::OK, "ok"));
        for (answer, fault) in [
            (readiness(true, Some("gone"), false), "the server drains"),
            (readiness(false, Some("gone"), true), "gone"),
            (readiness(false, None, false), "no connection to any proxy agent"),
        ] {
            assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
            assert_eq!(answer.body, fault);
        }
    }
}
