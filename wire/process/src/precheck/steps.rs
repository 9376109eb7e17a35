//! Steps that both processes have.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener, UdpSocket},
    path::Path,
};

use k8s_openapi::jiff::Timestamp;
use rustls::pki_types::CertificateDer;

use super::Report;
use crate::{
    descriptors,
    operator::{
        proofs::{CertificateText, TokenText},
        table::{bytes, seconds},
    },
    reload::Reloads,
    unix_socket::is_listened_on,
};

/// Time before the expiry of a proof from which on it is a warning, in seconds.
const SOON: i64 = 24 * 60 * 60;
/// Size of the kernel's UDP buffers below which they are a warning, in bytes.
const UDP_BUFFER: u64 = 4 << 20;
/// Difference of clocks that is a warning, in seconds.
const SKEW: i64 = 60;

/// The limit of open files.
pub fn descriptors(needed: u64, report: &mut Report) {
    let step = "descriptors";
    match descriptors::limit() {
        limit if limit < needed => report.warn(
            step,
            format!("the limit of open files is {limit}, the flags need {needed}"),
            "raise it (ulimit -n, LimitNOFILE=)",
        ),
        limit => report.ok(step, format!("the limit of open files is {limit}")),
    }
}

/// The largest UDP buffers that the kernel gives.
pub fn udp_buffers(report: &mut Report) {
    for name in ["rmem_max", "wmem_max"] {
        let step = format!("UDP buffers ({name})");
        let path = Path::new("/proc/sys/net/core").join(name);
        let size = fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
        match size {
            None => report.skip(step, "this kernel or container does not show net.core"),
            Some(size) if size < UDP_BUFFER => {
                let remedy = format!("set net.core.{name} to 8 MiB for high rates");
                report.warn(step, bytes(size), &remedy);
            }
            Some(size) => report.ok(step, bytes(size)),
        }
    }
}

/// The certificates of these files that peers will most likely refuse; nothing if there is none.
pub fn uses_of_certificates(files: &Reloads, report: &mut Report) {
    for fault in files.unfit() {
        report.warn("use of a certificate", fault, "issue it anew");
    }
}

/// The dates and names of a certificate, and the clock as far as they show it.
pub fn certificate(step: &str, certificate: Option<&CertificateDer<'_>>, report: &mut Report) {
    let Some(text) = certificate.and_then(|certificate| CertificateText::of(certificate)) else {
        return report.fail(step, "cannot be parsed", "give a certificate in PEM");
    };
    let now = Timestamp::now();
    let left = text.not_after.as_second() - now.as_second();
    let names = match text.names.is_empty() {
        true => "no alternative names".into(),
        false => text.names.join(", "),
    };
    let detail = format!("{} ({names}), valid until {}", text.subject, text.not_after);
    if left < 0 {
        report.fail(step, format!("{detail}: it has expired"), "renew it, or compare the clock");
    } else if now < text.not_before {
        let detail = format!("{detail}: it is valid from {} on", text.not_before);
        report.fail(step, detail, "compare this host's clock with that of the issuer");
    } else if left < SOON {
        report.warn(step, format!("{detail}: {} left", seconds(left.unsigned_abs())), "renew it");
    } else {
        report.ok(step, detail);
    }
}

/// The form, the dates and the audience of a token; without `audience` any is good.
pub fn token(text: &str, audience: Option<&str>, report: &mut Report) {
    let step = "token";
    let Some(token) = TokenText::of(text) else {
        let remedy = "give a projected service-account token";
        return report.fail(step, "the file has no JSON Web Token", remedy);
    };
    let now = Timestamp::now();
    let subject = token.subject.unwrap_or_else(|| "no subject".into());
    let audiences = token.audiences.join(", ");
    let detail = format!("{subject}, for {audiences}");
    if let Some(audience) =
        audience.filter(|audience| !token.audiences.iter().any(|a| a == audience))
    {
        let remedy = format!("project it with the audience {audience}");
        return report.fail(step, detail, &remedy);
    }
    if let Some(ahead) =
        token.issued.map(|at| at.as_second() - now.as_second()).filter(|s| *s > SKEW)
    {
        let detail = format!("it was issued {} from now", seconds(ahead.unsigned_abs()));
        report.warn("clock", detail, "set this host's clock, which is behind");
    }
    match token.expires.map(|at| (at, at.as_second() - now.as_second())) {
        None => report.warn(step, format!("{detail}; it does not expire"), "project a bound token"),
        Some((at, ..0)) => {
            report.fail(step, format!("{detail}; it expired at {at}"), "project it again");
        }
        Some((at, _)) => report.ok(step, format!("{detail}, until {at}")),
    }
}

/// Whether a port is free.
pub fn port(flag: &str, address: SocketAddr, udp: bool, report: &mut Report) {
    let kind = if udp { "UDP" } else { "TCP" };
    let step = format!("port of {flag} ({kind})");
    let bound = match udp {
        true => UdpSocket::bind(address).map(drop),
        false => TcpListener::bind(address).map(drop),
    };
    match bound {
        Ok(()) => report.ok(step, format!("{address} is free")),
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::AddrInUse => "stop the process that has it, or give another port",
                io::ErrorKind::PermissionDenied => {
                    "give a port above 1023, or CAP_NET_BIND_SERVICE"
                }
                _ => "give an address of this host",
            };
            report.fail(step, format!("{address}: {error}"), remedy);
        }
    }
}

/// Whether a Unix socket can be made at a path: its folder is there and can be written to, and no
/// other process listens there.
pub fn socket_folder(flag: &str, path: &Path, report: &mut Report) {
    let step = format!("folder of {flag}");
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let shown = folder.display();
    match nix::unistd::access(
        folder,
        nix::unistd::AccessFlags::W_OK | nix::unistd::AccessFlags::X_OK,
    ) {
        Ok(()) if is_listened_on(path) => {
            let detail = format!("another process listens on {}", path.display());
            let remedy = "stop it, or give another path: a process that starts takes a socket over";
            report.warn(step, detail, remedy);
        }
        Ok(()) => report.ok(step, format!("{shown} can be written to")),
        Err(error) => {
            let remedy = "make the folder, or mount it writable for this user";
            report.fail(step, format!("{shown}: {}", error.desc()), remedy);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// The result of the only step.
    fn only(check: impl FnOnce(&mut Report)) -> String {
        let mut report = Report::default();
        check(&mut report);
        let table = report.table();
        assert_eq!(table.lines().count(), 2, "{table}");
        table.lines().nth(1).unwrap_or_default().to_owned()
    }

    #[test]
    fn a_port_in_use_and_a_missing_folder_fail() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap();
        let line = only(|report| port("--agent-port", address, false, report));
        assert!(line.contains("FAILED") && line.contains("give another port"), "{line}");
        drop(held);
        let line = only(|report| port("--agent-port", address, false, report));
        assert!(line.contains("is free"), "{line}");
        let folder = tempfile::tempdir().unwrap();
        let line = only(|report| socket_folder("--uds-name", &folder.path().join("s"), report));
        assert!(line.contains(" ok "), "{line}");
        let _listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let line = only(|report| socket_folder("--uds-name", &folder.path().join("s"), report));
        assert!(line.contains("warning") && line.contains("another process listens"), "{line}");
        let missing = folder.path().join("missing/s");
        let line = only(|report| socket_folder("--uds-name", &missing, report));
        assert!(line.contains("FAILED"), "{line}");
    }

    #[test]
    fn certificates_and_tokens_have_dates() {
        let mut params = rcgen::CertificateParams::new(vec!["a.test".to_owned()]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let line = |params: &rcgen::CertificateParams| {
            let made = params.self_signed(&key).unwrap();
            only(|report| certificate("certificate", Some(made.der()), report))
        };
        assert!(line(&params).contains("a.test"), "{}", line(&params));
        params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        assert!(line(&params).contains("it has expired"), "{}", line(&params));
        let text = only(|report| token("x", None, report));
        assert!(text.contains("FAILED"), "{text}");
    }
}
