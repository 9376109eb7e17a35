//! Command lines with the rules of Go's pflag, declared with clap.
//!
//! Manifests for Konnectivity must keep working, and pflag differs from clap: a boolean takes its
//! value only after `=` and in any of Go's spellings, the last occurrence of a repeated flag
//! counts, those of a list add up, a value may begin with a hyphen or be empty, `a_b` is `a-b`,
//! words that belong to no flag are ignored, and every error ends in exit code 1. Structs of flags are ordinary clap derive; every plain `bool` in them becomes a Go
//! boolean.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Arg, ArgAction, Command, Parser, builder::ValueParser, error::ErrorKind};
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
    let Args { mut flags, words } = Args::normalised(&command, args);
    flags.extend(words);
    parse(&mut command, flags)
}

/// The flags in `args`, whose first item is the program's name, and the words that belong to no
/// flag, which Konnectivity ignores: a boolean's value without `=`, and what follows `--`.
///
/// # Errors
/// With the text to print and the exit code.
pub fn parse_with_words<F: Parser>(
    args: impl IntoIterator<Item = OsString>,
) -> Result<(F, Vec<OsString>), Exit> {
    let mut command = command::<F>();
    let Args { flags, words } = Args::normalised(&command, args);
    Ok((parse(&mut command, flags)?, words))
}

fn parse<F: Parser>(command: &mut Command, args: Vec<OsString>) -> Result<F, Exit> {
    let matches = command.try_get_matches_from_mut(args)?;
    if let Some(shell) = matches.get_one::<Shell>(COMPLETION) {
        return Err(completion(command, *shell));
    }
    Ok(F::from_arg_matches(&matches)?)
}

/// The clap command for `F` with pflag's rules, from which help and completion are made.
pub fn command<F: Parser>() -> Command {
    F::command()
        .after_help(NOTATION)
        .args_override_self(true)
        .mut_args(|arg| quiet_default(go_boolean(arg)))
        .arg(
            Arg::new(COMPLETION)
                .long(COMPLETION)
                .value_name("SHELL")
                .value_parser(clap::value_parser!(Shell))
                .help("Print a completion script for this shell and exit"),
        )
}

impl Exit {
    /// Prints the text and returns the exit code.
    pub fn print(&self) -> ExitCode {
        // Nothing is left to be done where the text cannot be written.
        let _ = if self.code == 0 {
            io::stdout().write_all(self.text.as_bytes())
        } else {
            io::stderr().write_all(self.text.as_bytes())
        };
        ExitCode::from(self.code)
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

/// Keeps `[default: ""]` out of help: an empty default is no value.
fn quiet_default(arg: Arg) -> Arg {
    let empty = arg.get_default_values().iter().all(|value| value.is_empty());
    if empty { arg.hide_default_value(true) } else { arg }
}

/// Arguments as clap takes them.
struct Args {
    /// The program's name and the flags, with hyphens in place of underscores in names, and with
    /// `--name value` as `--name=value`.
    flags: Vec<OsString>,
    /// What belongs to no flag.
    words: Vec<OsString>,
}

impl Args {
    fn normalised(command: &Command, args: impl IntoIterator<Item = OsString>) -> Self {
        let mut args = args.into_iter();
        let (mut flags, mut words) = (Vec::from_iter(args.next()), Vec::new());
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
                flags.push(arg);
                flags.extend(value);
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
        Self { flags, words }
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

fn joined(name: &str, value: Option<&OsStr>) -> OsString {
    let mut arg = OsString::from(format!("--{name}"));
    if let Some(value) = value {
        arg.push("=");
        arg.push(value);
    }
    arg
}

/// Whether the flag takes the next argument as its value if it has no `=`.
fn wants_value(command: &Command, name: &str) -> bool {
    let is_named = |arg: &&Arg| {
        arg.get_long() == Some(name)
            || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    };
    command
        .get_arguments()
        .find(is_named)
        .is_some_and(|arg| arg.get_action().takes_values() && !arg.is_require_equals_set())
}

fn completion(command: &mut Command, shell: Shell) -> Exit {
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
        #[arg(long, alias = "old-list", default_value = "")]
        list: String,
    }

    fn parse(args: &[&str]) -> Result<Sample, Exit> {
        try_parse_from(["sample"].iter().chain(args).map(OsString::from))
    }

    #[test]
    fn words_that_belong_to_no_flag_are_left_out_and_returned() {
        for (args, expected) in [
            (&["--off", "true"][..], &["true"][..]),
            (&["true", "--name", "x", "--off", "--on"], &["true"]),
            (&["-v", "8", "word", "--off"], &["word"]),
            (&["-v8", "7", "--off=true"], &["7"]),
            (&["--off", "", "-"], &["", "-"]),
            (&["--off", "--", "--name=y", "-z"], &["--name=y", "-z"]),
        ] {
            let all = ["sample"].iter().chain(args).map(OsString::from);
            let (flags, words) = parse_with_words::<Sample>(all).unwrap();
            assert!(flags.off, "{args:?}");
            assert_eq!(words, expected, "{args:?}");
        }
        let unknown = ["sample", "--nope", "word"].map(OsString::from);
        assert_eq!(parse_with_words::<Sample>(unknown).unwrap_err().code, 1);
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
            (&["-h"], "--completion"),
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
