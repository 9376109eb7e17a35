//! Culvert, Konnectivity and plain TCP side by side, each on a lossy link of its own, and keys that
//! break things.
//!
//! ```text
//!  lane      hosts, link, processes and load of one peer
//!  view      its last seconds, as a line of the table
//!  keys      what an operator presses
//! ```

mod keys;
mod lane;
mod view;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::{runtime::Runtime, time::interval};

use self::{
    keys::{Key, Keys},
    lane::{Hosts, Lane},
};
use super::{FRAME, Options, screen::Screen};
use crate::{
    go,
    link::{LinkSettings, settings::Direction},
    peer::{Peer, Programs, konnectivity},
    scenario::Congestion,
    tables::table,
};

/// Loss of a link on which a key has made everything worse, as a share.
const WORSE_LOSS: f64 = 0.05;

/// The peers of the demo, with the congestion control of their TCP.
fn field() -> Vec<(Peer, Congestion)> {
    use crate::frontend::Protocol::Connect;
    vec![
        (Peer::Culvert(Connect), Congestion::Cubic),
        (Peer::Konnectivity(Connect), Congestion::Cubic),
        (Peer::Konnectivity(Connect), Congestion::Bbr),
        (Peer::Direct, Congestion::Cubic),
    ]
}

/// Runs the peers side by side.
///
/// # Errors
/// When the process may not make network namespaces, or Culvert does not start.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let settings = settings(options);
    let here = Runtime::new()?;
    let folder = tempfile::Builder::new().prefix("culvert-programs-").tempdir()?;
    let loadtest = std::env::current_exe().context("cannot find this program's path")?;
    let field: Vec<_> = field()
        .into_iter()
        .filter(|(peer, _)| options.peers.is_empty() || options.peers.contains(peer))
        .collect();
    let konnectivity = match field.iter().any(|(peer, _)| matches!(peer, Peer::Konnectivity(_))) {
        true => here.block_on(build(folder.path().into()))?,
        false => None,
    };
    let programs =
        Programs { loadtest, server: None, agent: None, culvert_flags: Vec::new(), konnectivity };
    let mut hosts = Vec::new();
    for (peer, congestion) in field {
        if matches!(peer, Peer::Konnectivity(_)) && programs.konnectivity.is_none() {
            continue;
        }
        match Hosts::new(peer, congestion, &settings, &programs) {
            Ok(new) => hosts.push(new),
            Err(error) if peer.is_culvert() => return Err(error),
            Err(error) => eprintln!("{peer} with {congestion} cannot take part: {error:#}"),
        }
    }
    let result = here.block_on(show(&hosts, &settings, options));
    hosts.into_iter().for_each(Hosts::end);
    result
}

async fn build(folder: PathBuf) -> anyhow::Result<Option<konnectivity::Programs>> {
    if go::find().is_none() {
        eprintln!("{}", go::missing());
        return Ok(None);
    }
    eprintln!("building Konnectivity; the first time takes some minutes");
    konnectivity::Programs::build(&folder).await
}

fn settings(options: &Options) -> LinkSettings {
    let delay = options.delay.and_then(|delay| delay.non_negative()).unwrap_or_default();
    let each_way = Direction {
        rate_mbit: Some(options.rate),
        delay_ms: delay.as_secs_f64() * 1e3,
        loss: options.loss.unwrap_or_default() / 100.0,
        ..Direction::default()
    };
    LinkSettings { each_way, ..LinkSettings::default() }
}

/// What the keys have changed on all links.
#[derive(Clone, Copy, Debug, Default)]
struct Broken {
    udp: bool,
    loss: bool,
    link: bool,
}

async fn show(hosts: &[Hosts], settings: &LinkSettings, options: &Options) -> anyhow::Result<()> {
    let mut lanes = Vec::new();
    for host in hosts {
        eprintln!("starting {}", host.name());
        match Lane::start(host, options).await {
            Ok(lane) => lanes.push(lane),
            Err(error) => eprintln!("{} cannot take part: {error:#}", host.name()),
        }
    }
    anyhow::ensure!(!lanes.is_empty(), "nothing could start");
    let mut keys = Keys::read();
    let (started, time) = (Instant::now(), Duration::from_secs(options.seconds));
    let mut frames = interval(FRAME);
    let (mut screen, mut broken) = (Screen::new(), Broken::default());
    loop {
        tokio::select! {
            _ = frames.tick() => {}
            key = keys.next() => match key {
                Some(Key::Quit) => return Ok(()),
                Some(key) => press(key, &mut broken, settings, &mut lanes).await,
                None => {}
            },
        }
        lanes.iter_mut().for_each(Lane::take);
        let is_over = !options.hold && started.elapsed() >= time;
        screen.show(is_over, || draw(&lanes, settings, broken, keys.are_read()))?;
        if is_over {
            return Ok(());
        }
    }
}

/// Does to every link or agent what a key is for.
async fn press(key: Key, broken: &mut Broken, settings: &LinkSettings, lanes: &mut [Lane<'_>]) {
    match key {
        Key::Udp => broken.udp = !broken.udp,
        Key::Loss => broken.loss = !broken.loss,
        Key::Link => broken.link = !broken.link,
        Key::Agent | Key::Quit => {}
    }
    let mut changed = *settings;
    if broken.loss {
        changed.each_way.loss = WORSE_LOSS;
    }
    for lane in lanes {
        match key {
            Key::Agent => lane.restart_agent().await,
            Key::Udp => lane.block_udp(broken.udp),
            Key::Loss => lane.set(&changed),
            Key::Link => lane.cut(broken.link),
            Key::Quit => {}
        }
    }
}

fn draw(lanes: &[Lane<'_>], settings: &LinkSettings, broken: Broken, has_keys: bool) -> String {
    let mut rows =
        table(&["peer", "key p50", "p99", "last echo", "download", "cuts, failed dials"]);
    for lane in lanes {
        rows.add_row(lane.row());
    }
    let state = |on: bool, text: &'static str| if on { text } else { "" };
    let mut text = format!(
        "Each peer has a link of its own: {settings}{}{}{}\n{rows}\n\
         Keystrokes of five shells beside a download, in the last five seconds.",
        state(broken.loss, "; now 5 % loss"),
        state(broken.udp, "; UDP is blocked"),
        state(broken.link, "; the link is down"),
    );
    if has_keys {
        text += "\nKeys: u blocks UDP, l loses 5 %, d takes the link down (again: undone), \
                 k kills the agents, q quits";
    }
    text
}
