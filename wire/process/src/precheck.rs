//! `precheck`: checks with the flags of a process whether it would work, without running it.
//!
//! Each step has a result and, where it is not good, a remedy. The steps that both processes have
//! are in `steps`, and questions to kube-apiserver in `access`.

pub mod access;
pub mod steps;

use std::{ffi::OsString, io::Write as _, process::ExitCode, time::Duration};

use clap::{Arg, ArgAction, Command};
use serde::Serialize;
use tokio::time::timeout;

use crate::{
    cli::{ProcessConfig, Program},
    command_line::{self, CommandLine},
    descriptors,
    invocation::Invocation,
    operator::table::Table,
};

/// Name of the command.
const NAME: &str = "precheck";
/// Maximum time of all steps.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is good.
    Ok,
    /// The process works, but less well, or not for long.
    Warning,
    /// The process does not work.
    Failed,
    /// There is nothing to check, or an earlier step failed.
    Skipped,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
        }
    }
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What was checked.
    pub step: String,
    /// The result.
    pub result: Outcome,
    /// What was found.
    pub detail: String,
    /// What to do; empty where the result is good.
    pub remedy: String,
}

/// The steps so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    steps: Vec<Step>,
}

impl Report {
    /// Adds a step that is good.
    pub fn ok(&mut self, step: impl Into<String>, detail: impl ToString) {
        self.add(step, Outcome::Ok, detail, "");
    }

    /// Adds a step that is not good for long, or not as good as it could be.
    pub fn warn(&mut self, step: impl Into<String>, detail: impl ToString, remedy: &str) {
        self.add(step, Outcome::Warning, detail, remedy);
    }

    /// Adds a step that failed.
    pub fn fail(&mut self, step: impl Into<String>, detail: impl ToString, remedy: &str) {
        self.add(step, Outcome::Failed, detail, remedy);
    }

    /// Adds a step that was not made.
    pub fn skip(&mut self, step: impl Into<String>, detail: impl ToString) {
        self.add(step, Outcome::Skipped, detail, "");
    }

    fn add(
        &mut self,
        step: impl Into<String>,
        result: Outcome,
        detail: impl ToString,
        remedy: &str,
    ) {
        let (detail, remedy) = (detail.to_string(), remedy.to_owned());
        self.steps.push(Step { step: step.into(), result, detail, remedy });
    }

    /// Whether a step failed.
    pub fn has_failed(&self) -> bool {
        self.steps.iter().any(|step| step.result == Outcome::Failed)
    }

    /// The steps as a table for a terminal.
    pub fn table(&self) -> String {
        let mut table = Table::new(["STEP", "RESULT", "DETAIL"]);
        for step in &self.steps {
            let remedy = match step.remedy.as_str() {
                "" => String::new(),
                remedy => format!("; {remedy}"),
            };
            let detail = format!("{}{remedy}", step.detail);
            table.push([step.step.clone(), step.result.name().into(), detail]);
        }
        table.render()
    }
}

/// The command, for help and completion scripts.
pub fn command<P: Program>() -> Command {
    command_line::command::<<P::Config as ProcessConfig>::Flags>()
        .name(NAME)
        .about(
            "Checks with the flags of the process whether it would work, without running it: one \
             line for each step, with its result and the remedy. Exits with 1 if a step failed",
        )
        .long_about(None)
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .help("Print the steps as JSON"),
        )
}

/// Runs `check` after the flags were checked, if the arguments ask for it; `None` if they do not.
/// The program's path is the first of them.
pub fn run<P: Program>(
    args: &[OsString],
    check: impl AsyncFnOnce(P::Config, &mut Report),
) -> Option<ExitCode> {
    if args.get(1)?.to_str()? != NAME {
        return None;
    }
    // As the process does.
    let _ = descriptors::raise_limit();
    let invocation = Invocation::from_argv0(args.first().map(OsString::as_os_str));
    let (json, flags): (Vec<_>, Vec<_>) =
        args.iter().skip(2).cloned().partition(|arg| arg == "--json");
    let mut command = command::<P>().name(format!("{} {NAME}", P::NAME));
    let program = OsString::from(format!("{} {NAME}", P::NAME));
    let line = match CommandLine::read(&mut command, std::iter::once(program).chain(flags)) {
        Ok(line) => line,
        Err(exit) => return Some(exit.print()),
    };
    let mut report = Report::default();
    let sources = line.sources();
    match line.configuration(|flags| P::Config::from_flags(flags, invocation)) {
        Err(faults) => faults.iter().for_each(|fault| report.fail("flags", fault, "")),
        Ok((config, words)) => {
            let warnings = config.warnings().iter().map(|warning| sources.locate(warning));
            warnings.for_each(|warning| report.warn("flags", warning, ""));
            for word in words {
                report.warn("flags", format!("{word:?} belongs to no flag"), "remove it");
            }
            if config.warnings().is_empty() {
                report.ok("flags", "without a fault");
            }
            steps::descriptors(config.descriptors(), &mut report);
            check_within_limit::<P>(config, check, &mut report);
        }
    }
    let text = match json.is_empty() {
        true => report.table(),
        false => serde_json::to_string_pretty(&report.steps).unwrap_or_default() + "\n",
    };
    // Nothing is left to be done where the text cannot be written.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Some(if report.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn check_within_limit<P: Program>(
    config: P::Config,
    check: impl AsyncFnOnce(P::Config, &mut Report),
    report: &mut Report,
) {
    let runtime = match P::runtime().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report.fail("runtime", error, "raise the limit of threads"),
    };
    let timed_out = runtime.block_on(async { timeout(TIME_LIMIT, check(config, report)).await });
    if timed_out.is_err() {
        report.fail("time", format!("the steps took more than {TIME_LIMIT:?}"), "");
    }
    // Lookups of names may hang.
    runtime.shutdown_background();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_fails_the_report_and_shows_its_remedy() {
        let mut report = Report::default();
        report.ok("one", "fine");
        report.warn("two", "soon", "renew it");
        report.skip("three", "nothing to do");
        assert!(!report.has_failed());
        report.fail("four", "bad\nline", "mend it");
        assert!(report.has_failed());
        let table = report.table();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[1], "one    ok       fine");
        assert_eq!(lines[2], "two    warning  soon; renew it");
        assert_eq!(lines[4], "four   FAILED   bad\\nline; mend it");
        let json = serde_json::to_value(&report.steps).unwrap();
        assert_eq!(json[3]["result"], "failed");
    }
}
