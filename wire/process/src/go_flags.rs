//! Command lines with the rules of Go's pflag, declared with clap.
//!
//! Manifests for Konnectivity must keep working, and pflag differs from clap: a boolean takes its
//! value only after `=` and in any of Go's spellings, the last occurrence of a repeated flag
//! counts, those of a list add up, a value may begin with a hyphen or be empty, `a_b` is `a-b`,
//! words that belong to no flag are ignored, and every error ends in exit code 1. Structs of flags
//! are ordinary clap derive; every plain `bool` in them becomes a Go boolean.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Arg, ArgAction, ArgMatches, Command, Parser, builder::ValueParser, error::ErrorKind};
use clap_complete::Shell;

/// A reason to end before the work begins: `--help` and the like, or an error of the flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code: 0 for a text that was asked for, 1 for an error (2 with clap alone).
    pub code: u8,
    /// Text to print: on standard output for code 0, else on standard error.
    pub text: String,
}

/// The flags in `args`, whose first item is the program's name.
///
/// # Errors
/// With the text to print and the exit code.
pub fn try_parse_from<F: Parser>(args: impl IntoIterator<Item = OsString>) -> Result<F, Exit> {
    let mut command = command::<F>();
    let Args { program, flags, words } = Args::normalised(&command, args);
    let args = [program].into_iter().chain(flags).chain(words);
    let matches = command.try_get_matches_from_mut(args)?;
    if let Some(exit) = completion_of(&mut command, &matches) {
        return Err(exit);
    }
    Ok(F::from_arg_matches(&matches)?)
}

/// The completion script, if the flags ask for one.
pub(crate) fn completion_of(command: &mut Command, matches: &ArgMatches) -> Option<Exit> {
    let shell = matches.get_one::<Shell>(COMPLETION)?;
    Some(completion(command, *shell))
}

/// The clap command for `F` with pflag's rules, from which help and completion are made.
pub fn command<F: Parser>() -> Command {
    let command = F::command()
        .after_help(NOTATION)
        .args_override_self(true)
        .mut_args(|arg| apart_if_ignored(quiet_default(go_boolean(arg))));
    ignored_last(command).arg(
        Arg::new(COMPLETION)
            .long(COMPLETION)
            .value_name("SHELL")
            .value_parser(clap::value_parser!(Shell))
            .hide(true)
            .help("Print a completion script for this shell and exit"),
    )
}

impl Exit {
    /// Prints the text and returns the exit code: 1 if standard output does not take it, but for a
    /// reader that has left.
    pub fn print(&self) -> ExitCode {
        if self.code != 0 {
            // Nothing is left to be done where the text cannot be written.
            let _ = io::stderr().write_all(self.text.as_bytes());
            return ExitCode::from(self.code);
        }
        let mut output = io::stdout();
        match output.write_all(self.text.as_bytes()).and_then(|()| output.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                let _ = writeln!(io::stderr(), "cannot write to standard output: {error}");
                ExitCode::FAILURE
            }
            _ => ExitCode::SUCCESS,
        }
    }
}

impl From<clap::Error> for Exit {
    fn from(error: clap::Error) -> Self {
        let code = match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
            _ => 1,
        };
        Self { code, text: error.render().to_string() }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The boolean that Go's `strconv.ParseBool` reads from `text`.
///
/// # Errors
/// With a sentence that names the valid spellings.
pub fn parse_bool(text: &str) -> Result<bool, String> {
    culvert_wire::identifiers::parse_go_bool(text)
        .ok_or_else(|| "write true or false (1, t, 0 and f do as well)".to_owned())
}

/// The items of a comma-separated list. `[a,b]`, which is how Go prints one, is `a,b`, and `[]` is
/// empty: Konnectivity's tests pass every flag as Go prints it.
pub fn parse_list(text: &str) -> Vec<String> {
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    inner.split(',').filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

const COMPLETION: &str = "completion";

/// Notation of values, at the end of help.
const NOTATION: &str = "\
BOOL is true or false; a flag without a value is true.
DURATION is numbers with units, such as 300ms, 10s or 1h30m.
SIZE is a number of bytes, or a number with Ki, Mi or Gi.
LIST is separated by commas.";

/// Gives a plain `bool` Go's rules: `--f` and `--f=VALUE`, never `--f VALUE`.
fn go_boolean(arg: Arg) -> Arg {
    if !matches!(arg.get_action(), ArgAction::SetTrue) {
        return arg;
    }
    let defaulted = !arg.get_default_values().is_empty();
    let arg = arg
        .action(ArgAction::Set)
        .num_args(0..=1)
        .require_equals(true)
        .default_missing_value("true")
        .value_name("BOOL")
        .value_parser(ValueParser::new(parse_bool));
    if defaulted { arg } else { arg.default_value("false") }
}

/// Heading of the flags that are accepted for Konnectivity's manifests and have no effect.
const IGNORED_HEADING: &str = "Without effect, for Konnectivity's manifests";
/// What the help of each of them says.
const IGNORED: &str = "Accepted and ignored";

/// Puts a flag that is accepted and ignored under a heading of its own, which `-h` leaves out.
fn apart_if_ignored(arg: Arg) -> Arg {
    let is_ignored = arg.get_help().is_some_and(|help| help.to_string().contains(IGNORED));
    match is_ignored {
        true => arg.help_heading(IGNORED_HEADING).hide_short_help(true),
        false => arg,
    }
}

/// Puts the heading of the flags without effect behind all others.
pub(crate) fn ignored_last(command: Command) -> Command {
    let is_ignored = |arg: &&Arg| arg.get_help_heading() == Some(IGNORED_HEADING);
    let ignored: Vec<_> =
        command.get_arguments().filter(is_ignored).map(|arg| arg.get_id().clone()).collect();
    // `mut_arg` moves the argument to the end.
    ignored.into_iter().fold(command, |command, id| command.mut_arg(id, |arg| arg))
}

/// Keeps `[default: ""]` out of help: an empty default is no value.
fn quiet_default(arg: Arg) -> Arg {
    let empty = arg.get_default_values().iter().all(|value| value.is_empty());
    if empty { arg.hide_default_value(true) } else { arg }
}

/// Arguments as clap takes them.
pub(crate) struct Args {
    /// The program's name.
    pub(crate) program: OsString,
    /// The flags, with hyphens in place of underscores in names, each with its value as
    /// `--name=value` or `-v=value`.
    pub(crate) flags: Vec<OsString>,
    /// What belongs to no flag.
    pub(crate) words: Vec<OsString>,
}

impl Args {
    pub(crate) fn normalised(command: &Command, args: impl IntoIterator<Item = OsString>) -> Self {
        let mut args = args.into_iter();
        let program = args.next().unwrap_or_default();
        let (mut flags, mut words) = (Vec::new(), Vec::new());
        while let Some(arg) = args.next() {
            if arg == "--" {
                words.extend(args);
                break;
            }
            if !is_flag(&arg) {
                words.push(arg);
                continue;
            }
            let Some(body) = arg.to_str().and_then(|text| text.strip_prefix("--")) else {
                let value = if is_short_without_value(command, &arg) { args.next() } else { None };
                flags.push(with_value(arg, value.as_deref()));
                continue;
            };
            let (name, value) = match body.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (body, None),
            };
            let name = name.replace('_', "-");
            let value = match value {
                Some(value) => Some(OsString::from(value)),
                None if wants_value(command, &name) => args.next(),
                None => None,
            };
            flags.push(joined(&name, value.as_deref()));
        }
        Self { program, flags, words }
    }
}

/// Whether pflag takes the argument for a flag: it begins with a hyphen and is not one alone.
fn is_flag(arg: &OsStr) -> bool {
    arg.len() > 1 && arg.as_encoded_bytes().starts_with(b"-")
}

/// Whether this is a flag of one letter that takes the next argument as its value.
fn is_short_without_value(command: &Command, arg: &OsStr) -> bool {
    let mut letters = arg.to_str().unwrap_or_default().chars().skip(1);
    let (Some(letter), None) = (letters.next(), letters.next()) else { return false };
    let mut named = command.get_arguments().filter(|arg| arg.get_short() == Some(letter));
    named.next().is_some_and(|arg| arg.get_action().takes_values())
}

/// `--name=value`, or `--name`.
pub(crate) fn joined(name: &str, value: Option<&OsStr>) -> OsString {
    with_value(format!("--{name}").into(), value)
}

fn with_value(mut arg: OsString, value: Option<&OsStr>) -> OsString {
    if let Some(value) = value {
        arg.push("=");
        arg.push(value);
    }
    arg
}

/// Whether the flag takes the next argument as its value if it has no `=`.
fn wants_value(command: &Command, name: &str) -> bool {
    arg_of(command, name)
        .is_some_and(|arg| arg.get_action().takes_values() && !arg.is_require_equals_set())
}

/// The flag of this name, or with this alias.
pub(crate) fn arg_of<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| {
        arg.get_long() == Some(name)
            || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    })
}

/// clap's name of the flag in this normalised argument.
pub(crate) fn id_of(command: &Command, flag: &OsStr) -> Option<String> {
    let text = flag.to_string_lossy();
    let arg = match text.strip_prefix("--") {
        Some(body) => arg_of(command, body.split('=').next()?),
        None => {
            let letter = text.chars().nth(1)?;
            command.get_arguments().find(|arg| arg.get_short() == Some(letter))
        }
    };
    arg.map(|arg| arg.get_id().to_string())
}

/// The completion script of a command.
pub(crate) fn completion(command: &mut Command, shell: Shell) -> Exit {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, command, name, &mut script);
    Exit { code: 0, text: String::from_utf8_lossy(&script).into_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::go_duration::GoDuration;

    #[derive(Debug, Parser)]
    #[command(name = "sample", version = "1.2.3")]
    struct Sample {
        #[arg(long, default_value = "")]
        name: String,
        #[arg(long)]
        off: bool,
        #[arg(long, default_value_t = true)]
        on: bool,
        #[arg(short = 'v', long = "v", default_value_t = 4)]
        verbosity: i32,
        #[arg(long, default_value = "1h")]
        keepalive_time: GoDuration,
        /// An interval. Accepted and ignored
        #[arg(long, help_heading = "Intervals", default_value = "1s")]
        probe_interval: GoDuration,
        #[arg(long, alias = "old-list", help_heading = "Lists", default_value = "")]
        list: String,
    }

    fn parse(args: &[&str]) -> Result<Sample, Exit> {
        try_parse_from(["sample"].iter().chain(args).map(OsString::from))
    }

    #[test]
    fn values_follow_an_equals_sign_or_a_space() {
        for args in [&["--name=a=b"][..], &["--name", "a=b"]] {
            assert_eq!(parse(args).unwrap().name, "a=b");
        }
        assert_eq!(parse(&["--name", "-x"]).unwrap().name, "-x");
        assert_eq!(parse(&["--name", "--off"]).unwrap().name, "--off");
        assert_eq!(parse(&["--name=x", "--name="]).unwrap().name, "");
        assert_eq!(parse(&["--old-list", "-a"]).unwrap().list, "-a");
    }

    #[test]
    fn booleans_take_a_value_only_after_an_equals_sign() {
        for (args, off, on) in [
            (&[][..], false, true),
            (&["--off"], true, true),
            (&["--off=true", "--on=false"], true, false),
            (&["--off=1", "--on=0"], true, false),
            (&["--off=t", "--on=f"], true, false),
            (&["--off=TRUE", "--on=False"], true, false),
            (&["--on=false", "--on"], false, true),
        ] {
            let flags = parse(args).unwrap();
            assert_eq!((flags.off, flags.on), (off, on), "{args:?}");
        }
        for args in [["--off=yes"], ["--off="], ["--off=tRue"]] {
            let exit = parse(&args).unwrap_err();
            assert_eq!(exit.code, 1);
            assert!(exit.text.contains("--off"), "{}", exit.text);
        }
    }

    #[test]
    fn the_last_of_a_repeated_flag_wins() {
        let flags =
            parse(&["--name=a", "--off", "-v=8", "--off=f", "--name", "b", "--v=3"]).unwrap();
        assert_eq!((flags.name.as_str(), flags.off, flags.verbosity), ("b", false, 3));
    }

    #[test]
    fn underscores_in_names_are_hyphens_and_stay_in_values() {
        let flags = parse(&["--keepalive_time=100ms", "--name=a_b"]).unwrap();
        assert_eq!(flags.keepalive_time.to_string(), "100ms");
        assert_eq!(flags.name, "a_b");
    }

    #[test]
    fn verbosity_has_all_of_pflags_forms() {
        for args in [&["-v=8"][..], &["-v", "8"], &["-v8"], &["--v=8"], &["--v", "8"]] {
            assert_eq!(parse(args).unwrap().verbosity, 8, "{args:?}");
        }
        assert_eq!(parse(&["-v"]).unwrap_err().code, 1);
    }

    #[test]
    fn an_error_ends_in_code_1_and_names_the_flag() {
        for (args, named) in [
            (&["--nope=1"][..], "--nope"),
            (&["--nam=1"], "--nam"),
            (&["-x"], "-x"),
            (&["word"], "word"),
            (&["--keepalive-time=10"], "--keepalive-time"),
            (&["--keepalive-time="], "--keepalive-time"),
            (&["--name"], "--name"),
        ] {
            let exit = parse(args).unwrap_err();
            assert_eq!(exit.code, 1, "{args:?}");
            assert!(exit.text.contains(named), "{}", exit.text);
        }
    }

    #[test]
    fn help_version_and_completion_end_in_code_0() {
        for (args, text) in [
            (&["--help"][..], "--keepalive-time"),
            (&["-h"], "--keepalive-time"),
            (&["--version"], "sample 1.2.3"),
            (&["--completion=bash"], "--keepalive-time"),
            (&["--completion", "zsh"], "--keepalive-time"),
            (&["--completion=fish"], "keepalive-time"),
            (&["--completion=elvish"], "--keepalive-time"),
            (&["--completion=powershell"], "--keepalive-time"),
        ] {
            let exit = parse(args).unwrap_err();
            assert_eq!(exit.code, 0, "{args:?}");
            assert!(exit.text.contains(text), "{args:?}: {}", exit.text);
        }
        assert_eq!(parse(&["--completion=csh"]).unwrap_err().code, 1);
    }

    #[test]
    fn flags_without_effect_are_together_and_in_the_long_help_alone() {
        let mut command = command::<Sample>();
        let long = command.render_long_help().to_string();
        let (_, ignored) = long.split_once(&format!("\n{IGNORED_HEADING}:\n")).unwrap();
        assert!(ignored.contains("--probe-interval") && !ignored.contains("--name"), "{long}");
        let heading = |line: &&str| line.ends_with(':') && !line.starts_with(' ');
        assert_eq!(ignored.lines().find(heading), None, "the last heading: {long}");
        let short = command.render_help().to_string();
        assert!(short.contains("--name") && !short.contains("--probe-interval"), "{short}");
    }

    #[test]
    fn lists_are_comma_separated_with_or_without_gos_brackets() {
        for (text, items) in [
            ("", &[][..]),
            ("[]", &[]),
            ("a", &["a"]),
            ("a,b", &["a", "b"]),
            ("[a,b]", &["a", "b"]),
        ] {
            assert_eq!(parse_list(text), items, "{text}");
        }
    }
}
