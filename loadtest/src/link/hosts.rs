//! A link for programs that are not part of this one: two network namespaces and commands over
//! standard input.

use std::{
    io::{self, BufRead, Write},
    net::Ipv4Addr,
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::{Host, Link, LinkSettings, NODE, SERVER, Udp};

/// The two hosts, as they are printed.
#[derive(Debug, Serialize)]
struct Hosts {
    server: HostOf,
    node: HostOf,
}

#[derive(Debug, Serialize)]
struct HostOf {
    /// Path of the network namespace, for `nsenter --net=PATH`.
    namespace: PathBuf,
    /// Address of its device `link`.
    address: String,
}

/// One line of standard input, as JSON.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// New settings of the link.
    Set(Box<LinkSettings>),
    /// Treatment of UDP packets.
    Udp(UdpTreatment),
    /// Lose every packet.
    Down,
    /// Carry packets again.
    Up,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum UdpTreatment {
    Pass,
    Drop,
    Reject,
}

impl From<UdpTreatment> for Udp {
    fn from(treatment: UdpTreatment) -> Self {
        match treatment {
            UdpTreatment::Pass => Self::Pass,
            UdpTreatment::Drop => Self::Drop,
            UdpTreatment::Reject => Self::Reject,
        }
    }
}

/// Prints the hosts as one line of JSON, and carries out commands until the input ends. Each line
/// is answered by `ok`, or by `error: ` and the reason.
///
/// # Errors
/// When the process may not make a link, or input or output fails.
pub fn serve(
    settings: &LinkSettings,
    seed: u64,
    commands: impl BufRead,
    mut answers: impl Write,
) -> anyhow::Result<()> {
    let link = Link::start(settings, seed)?;
    let host = |host: &Host, address: Ipv4Addr| HostOf {
        namespace: host.path(),
        address: address.to_string(),
    };
    let hosts = Hosts { server: host(&link.server, SERVER), node: host(&link.node, NODE) };
    answer(&mut answers, &serde_json::to_string(&hosts)?)?;
    for line in commands.lines() {
        match obey(&link, &line?) {
            Ok(()) => answer(&mut answers, "ok")?,
            Err(fault) => answer(&mut answers, &format!("error: {fault}"))?,
        }
    }
    Ok(())
}

fn obey(link: &Link, line: &str) -> Result<(), String> {
    match serde_json::from_str(line).map_err(|error| error.to_string())? {
        Line::Set(settings) => match settings.faults() {
            faults if faults.is_empty() => link.set(&settings),
            faults => return Err(faults.join("; ")),
        },
        Line::Udp(treatment) => link.udp(treatment.into()),
        Line::Down => link.down(),
        Line::Up => link.up(),
    }
    Ok(())
}

fn answer(answers: &mut impl Write, text: &str) -> io::Result<()> {
    writeln!(answers, "{text}")?;
    answers.flush()
}

#[cfg(test)]
mod tests {
    use super::{Line, UdpTreatment};

    #[test]
    fn commands_are_read_from_json() {
        let read = |text| serde_json::from_str::<Line>(text);
        let Ok(Line::Set(settings)) = read(r#"{"set": {"each_way": {"loss": 0.05}}}"#) else {
            panic!("settings are not read");
        };
        assert_eq!(settings.to_server().loss, 0.05);
        assert_eq!(read(r#"{"udp": "drop"}"#).ok(), Some(Line::Udp(UdpTreatment::Drop)));
        assert_eq!(read(r#""down""#).ok(), Some(Line::Down));
        assert!(read(r#"{"set": {"loss": 0.05}}"#).is_err(), "an unknown key is accepted");
    }
}
