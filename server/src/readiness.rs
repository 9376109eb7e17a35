//! Readiness of a server, in the words of Konnectivity's.

use culvert_process::admin::AdminResponse;
use hyper::StatusCode;

/// The answer to `/readyz`: 200 `ok`, or 500 while no agent is connected.
pub(crate) fn readiness(has_backend: bool) -> AdminResponse {
    if has_backend {
        AdminResponse::text(StatusCode::OK, "ok")
    } else {
        AdminResponse::text(StatusCode::INTERNAL_SERVER_ERROR, "no connection to any proxy agent")
    }
}

/// The answer to `/readyz` from the first signal to stop until the end: 500.
pub(crate) fn draining() -> AdminResponse {
    AdminResponse::text(StatusCode::INTERNAL_SERVER_ERROR, "the server drains")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_ready_while_an_agent_is_connected() {
        assert_eq!(readiness(true), AdminResponse::text(StatusCode::OK, "ok"));
        let not_ready = readiness(false);
        assert_eq!(not_ready.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(not_ready.body, "no connection to any proxy agent");
    }
}
