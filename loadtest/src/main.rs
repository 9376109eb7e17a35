//! `culvert-loadtest`: demo and measurements for an operator before a migration.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use culvert_loadtest::{
    compare::{self, Comparison},
    demo,
    flags::named,
    fleet, link,
    report::{
        Report,
        headline::picture,
        html::page,
        markdown::markdown,
        table::{Look, table},
    },
    scenario::Scenario,
    scratch::Scratch,
    soak,
};
use tokio::signal::unix::SignalKind;

/// Culvert on one machine: a demo, and measurements beside Konnectivity and plain TCP.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a server, agents and targets in this process, with temporary certificates, and show
    /// sessions like exec, logs and port-forward through the tunnels
    Demo(demo::Options),
    /// Run scenarios through Culvert, Konnectivity and plain TCP in turn, and compare
    ///
    /// Requires root, or a user namespace: `unshare -Urn culvert-loadtest compare …`. Konnectivity
    /// and the gRPC frontend require Go.
    Compare(Compare),
    /// Run servers and agents under a mixed load with disturbances, and look for leaks
    ///
    /// Exits with code 1 when descriptors, threads, tasks, memory, sockets or metric series of a
    /// process grow, when a dial or a stream fails without a disturbance that explains it, or when
    /// bytes differ. Requires root, or a user namespace: `unshare -Urn culvert-loadtest soak`.
    Soak(soak::Options),
    /// Measure the emulated link on this machine, and compare the results with the link's settings
    Link,
    /// Join two network namespaces by an emulated link, for programs of your own
    ///
    /// Prints the namespaces and their addresses as JSON. Each line of standard input is a command,
    /// answered by `ok` or `error: …`: {"set": {"each_way": {"delay_ms": 10, "loss": 0.01}}} with
    /// the keys of a scenario's link, {"udp": "drop"} or "pass" or "reject", "down", "up". The
    /// link lasts until standard input ends. Requires root, or a user namespace.
    ///
    /// Losses are independent of one another with "loss": 0.01, and come in bursts
    /// (Gilbert–Elliott) with "bursts": {"mean_loss": 0.01, "mean_length": 4}, where the length is
    /// a number of packets.
    Hosts(Hosts),
    /// List the built-in scenarios
    Scenarios,
    /// Show the results of earlier comparisons from their JSON files. If a scenario is in several
    /// files, the last file counts
    Render(Render),
}

#[derive(Debug, Args)]
struct Compare {
    /// Scenario to run: a name that `scenarios` lists, or the path of a TOML file; may be given
    /// several times
    ///
    /// The file names a link, workloads, events such as UDP being dropped, flags of Culvert's
    /// server and agent, and goals; loadtest/src/scenario.rs has every key.
    #[arg(long = "scenario", value_name = "NAME", required_unless_present = "all")]
    scenarios: Vec<String>,
    /// Run every built-in scenario
    #[arg(long, conflicts_with = "scenarios")]
    all: bool,
    /// Exit with code 2 when a goal is missed
    #[arg(long)]
    check: bool,
    /// File to write all measurements to, as JSON
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// File to write a page with plots to, as HTML
    #[arg(long, value_name = "PATH")]
    html: Option<PathBuf>,
    /// File to write a plot of the first scenario to, as SVG
    #[arg(long, value_name = "PATH")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    options: compare::Options,
}

#[derive(Debug, Args)]
struct Hosts {
    /// Settings of the link as JSON, with the keys of a scenario's link
    #[arg(long, value_name = "JSON", default_value = "{}")]
    link: String,
    /// Seed of the link's losses
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Args)]
struct Render {
    /// File that `compare --json` wrote
    #[arg(required = true, value_name = "PATH")]
    json: Vec<PathBuf>,
    /// File to write a page with plots to, as HTML
    #[arg(long, value_name = "PATH")]
    html: Option<PathBuf>,
    /// File to write a plot of the first scenario to, as SVG
    #[arg(long, value_name = "PATH")]
    svg: Option<PathBuf>,
    /// Print Markdown instead of tables for a terminal
    #[arg(long)]
    markdown: bool,
}

fn main() -> ExitCode {
    // Under the name of a side's program, or with the name of a side, this is that side.
    let mut args = std::env::args_os();
    let program = args.next().map(PathBuf::from);
    match program.as_deref().and_then(Path::file_name).and_then(OsStr::to_str) {
        Some("culvert-server" | "proxy-server") => {
            return culvert_server::cli::main(std::env::args_os());
        }
        Some("culvert-agent" | "proxy-agent") => {
            return culvert_agent::cli::main(std::env::args_os());
        }
        _ => {}
    }
    match args.next().as_deref().and_then(|side| side.to_str()) {
        Some("server") => culvert_server::cli::main(named("culvert-server", args)),
        Some("agent") => culvert_agent::cli::main(named("culvert-agent", args)),
        Some("exec") => link::exec::main(args),
        Some("fleet") => fleet::main(args),
        _ => run(Flags::parse().command),
    }
}

fn run(command: Command) -> ExitCode {
    let result = match command {
        Command::Demo(options) => run_demo(&options),
        Command::Compare(options) => run_compare(options),
        Command::Soak(options) => run_soak(&options),
        Command::Link => {
            link::check::check().map(|table| println!("{table}")).map(|()| ExitCode::SUCCESS)
        }
        Command::Hosts(options) => join_hosts(&options),
        Command::Scenarios => list_scenarios(),
        Command::Render(options) => render(&options),
    };
    result.unwrap_or_else(|error| {
        eprintln!("culvert-loadtest: {error:#}");
        ExitCode::FAILURE
    })
}

fn run_demo(options: &demo::Options) -> anyhow::Result<ExitCode> {
    if options.is_race() {
        let _scratch = Scratch::new(&Scratch::all_signals())?;
        demo::race::run(options)?;
        return Ok(ExitCode::SUCCESS);
    }
    // The demo itself ends at the others.
    let _scratch = Scratch::new(&[SignalKind::hangup(), SignalKind::quit()])?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(demo::run(options))?;
    Ok(ExitCode::SUCCESS)
}

fn run_soak(options: &soak::Options) -> anyhow::Result<ExitCode> {
    // The soak itself ends at the others.
    let _scratch = Scratch::new(&[SignalKind::hangup(), SignalKind::quit()])?;
    let report = soak::run(options, std::env::current_exe()?)?;
    println!("{report}");
    if let Some(path) = &options.json {
        write(path, &serde_json::to_string_pretty(&report)?)?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn join_hosts(options: &Hosts) -> anyhow::Result<ExitCode> {
    let settings = serde_json::from_str(&options.link).context("--link is not a link")?;
    link::hosts::serve(&settings, options.seed, io::stdin().lock(), io::stdout().lock())?;
    Ok(ExitCode::SUCCESS)
}

fn list_scenarios() -> anyhow::Result<ExitCode> {
    print(&Scenario::list()?);
    Ok(ExitCode::SUCCESS)
}

/// Prints a text. A reader that leaves before its end, such as `head`, is no fault.
fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

fn render(options: &Render) -> anyhow::Result<ExitCode> {
    let mut reports: Vec<Report> = Vec::new();
    for path in &options.json {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let read: Vec<Report> = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not a report", path.display()))?;
        for report in read {
            match reports.iter_mut().find(|other| other.scenario == report.scenario) {
                Some(earlier) => *earlier = report,
                None => reports.push(report),
            }
        }
    }
    if let Some(path) = &options.html {
        write(path, &page(&reports))?;
    }
    if let Some(path) = &options.svg {
        write(path, &picture(reports.first()))?;
    }
    if options.markdown {
        print!("{}", markdown(&reports));
    } else {
        reports.iter().for_each(|report| print(&format!("{}\n", table(report, Look::of_stdout()))));
    }
    Ok(ExitCode::SUCCESS)
}

fn run_compare(compare: Compare) -> anyhow::Result<ExitCode> {
    let names = match compare.all {
        true => Scenario::names().into_iter().map(str::to_owned).collect(),
        false => compare.scenarios,
    };
    // All faults before the first run.
    [&compare.json, &compare.html, &compare.svg].into_iter().flatten().try_for_each(writable)?;
    let scenarios =
        names.iter().map(|name| Scenario::load(name)).collect::<anyhow::Result<Vec<_>>>()?;
    let _scratch = Scratch::new(&Scratch::all_signals())?;
    let words: Vec<_> = std::env::args().skip(1).collect();
    let command = format!("culvert-loadtest {}", words.join(" "));
    let loadtest = std::env::current_exe().context("cannot find this program's path")?;
    let comparison = Comparison::prepare(compare.options, loadtest, &scenarios)?;
    let mut reports = Vec::new();
    for scenario in &scenarios {
        let report = comparison.run(scenario, &command)?;
        println!("{}", table(&report, Look::of_stdout()));
        reports.push(report);
        // After each, so that what has been measured survives whatever comes.
        if let Some(path) = &compare.json {
            write(path, &serde_json::to_string(&reports)?)?;
        }
        if let Some(path) = &compare.html {
            write(path, &page(&reports))?;
        }
        if let Some(path) = &compare.svg {
            write(path, &picture(reports.first()))?;
        }
    }
    let reached = reports.iter().flat_map(|report| &report.goals).all(|goal| goal.reached);
    Ok(if compare.check && !reached { ExitCode::from(2) } else { ExitCode::SUCCESS })
}

/// Whether a file can be written, which is known only after an attempt. It stays as it is.
fn writable(path: &PathBuf) -> anyhow::Result<()> {
    let is_new = !path.exists();
    let opened = fs::OpenOptions::new().append(true).create(true).open(path);
    opened.with_context(|| format!("cannot write {}", path.display()))?;
    if is_new {
        fs::remove_file(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn write(path: &PathBuf, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
