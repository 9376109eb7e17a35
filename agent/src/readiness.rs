//! The agent's answer to `/readyz`, in Konnectivity's words.

use culvert_process::admin::AdminResponse;
use http::StatusCode;

/// 200 `ok` while a server is connected, or the list of checks when `verbose`; otherwise 503 and
/// the list. `tunnels` are further lines, about each tunnel.
pub(crate) fn answer(connected: bool, verbose: bool, tunnels: &[String]) -> AdminResponse {
    let lines: String = tunnels.iter().map(|line| format!("{line}\n")).collect();
    match (connected, verbose) {
        (true, false) => AdminResponse::text(StatusCode::OK, "ok"),
        (true, true) => {
            let checks = "[+]ping ok\n[+]server-connected ok\n";
            AdminResponse::text(StatusCode::OK, format!("{checks}{lines}check passed\n"))
        }
        (false, _) => {
            let checks = "[+]ping ok\n[-]server-connected failed: no servers connected\n";
            AdminResponse::text(StatusCode::SERVICE_UNAVAILABLE, format!("{checks}{lines}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_ready_once_a_server_is_connected() {
        let tunnel = ["[+]a tunnel".to_owned()];
        for (connected, verbose, lines, status, body) in [
            (true, false, &tunnel[..], 200, "ok"),
            (true, true, &[], 200, "[+]ping ok\n[+]server-connected ok\ncheck passed\n"),
            (
                true,
                true,
                &tunnel,
                200,
                "[+]ping ok\n[+]server-connected ok\n[+]a tunnel\ncheck passed\n",
            ),
            (
                false,
                false,
                &[],
                503,
                "[+]ping ok\n[-]server-connected failed: no servers connected\n",
            ),
            (
                false,
                true,
                &tunnel,
                503,
                "[+]ping ok\n[-]server-connected failed: no servers connected\n[+]a tunnel\n",
            ),
        ] {
            let answer = answer(connected, verbose, lines);
            assert_eq!((answer.status.as_u16(), &*answer.body), (status, body.as_bytes()));
        }
    }
}
