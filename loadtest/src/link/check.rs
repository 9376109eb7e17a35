//! Capacity and precision of links on this machine, measured from outside.

use comfy_table::{Table, presets};

use super::{
    Link, LinkSettings,
    probe::{Probe, measure},
    settings::{Bursts, Direction},
};

/// Measures rate, delay, loss and capacity of links, and compares them with their settings.
///
/// # Errors
/// When the process may not make a link.
pub fn check() -> anyhow::Result<String> {
    let rate = |rate_mbit: f64| Direction { rate_mbit: Some(rate_mbit), ..Direction::default() };
    let bursts = Bursts { mean_loss: 0.05, mean_length: 4.0, bad_loss: 1.0 };
    let bursts = Direction { bursts: Some(bursts), ..Direction::default() };
    let probes = [
        ("10 ms", Direction { delay_ms: 10.0, ..Direction::default() }, 1000, 100, 1000.0),
        ("100 Mbit/s", rate(100.0), 20_000, 1500, 20_000.0),
        ("1 Gbit/s", rate(1000.0), 200_000, 1500, 100_000.0),
        ("5 % loss", Direction { loss: 0.05, ..Direction::default() }, 50_000, 100, 50_000.0),
        ("5 % loss in bursts of 4", bursts, 50_000, 100, 50_000.0),
        ("no limit, small packets", Direction::default(), 300_000, 100, 150_000.0),
        ("no limit, large packets", Direction::default(), 200_000, 1500, 150_000.0),
    ];
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["link", "Mbit/s", "packets/s", "delay p50, ms", "p99, ms", "lost, %"]);
    for (name, each_way, datagrams, length, per_second) in probes {
        let link = Link::start(&LinkSettings { each_way, ..LinkSettings::default() }, 1)?;
        let measured = measure(&link, Probe { datagrams, length, per_second })?;
        let millis = |share| format!("{:.2}", measured.delay(share).as_secs_f64() * 1000.0);
        table.add_row([
            name.to_owned(),
            format!("{:.1}", measured.mbit_per_second),
            format!("{:.0}", measured.packets_per_second),
            millis(0.5),
            millis(0.99),
            format!("{:.2}", measured.loss() * 100.0),
        ]);
    }
    Ok(table.to_string())
}
