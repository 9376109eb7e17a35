use std::fs;

use clap::ValueEnum;

use super::*;
use crate::{byte_size::ByteSize, faults::Faults, go_duration::GoDuration};

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Colour {
    Red,
    Green,
}

#[derive(Debug, Parser)]
#[command(name = "sample", version = "1.2.3")]
struct Sample {
    #[arg(long, default_value = "")]
    name: String,
    #[arg(long, default_value_t = 1)]
    port: i64,
    #[arg(long)]
    off: bool,
    #[arg(short = 'v', long = "v", default_value_t = 4)]
    verbosity: i32,
    #[arg(long, default_value = "1h")]
    keepalive_time: GoDuration,
    #[arg(long, value_parser = clap::value_parser!(ByteSize))]
    size: Option<ByteSize>,
    #[arg(long, alias = "old-rules")]
    rules: Vec<String>,
    #[arg(long, value_name = "LIST", default_value = "")]
    list: String,
    #[arg(long, value_enum, default_value = "red")]
    colour: Colour,
    #[arg(long, env = "SAMPLE_CARGO", default_value = "")]
    cargo: String,
    #[arg(long, env = "PATH", default_value = "")]
    path: String,
}

type Outcome = Result<(Sample, Vec<OsString>), String>;

fn read(args: &[&str]) -> Outcome {
    let args = ["sample"].iter().chain(args).map(OsString::from);
    let line = CommandLine::<Sample>::read(&mut command::<Sample>(), args);
    let line = line.map_err(|exit| exit.text)?;
    let checked = line.configuration(|flags| {
        let mut faults = Faults::new();
        faults.require(flags.port > 0, "port", "must be above 0");
        faults.require(flags.name != "bad", "name", "must not be bad");
        faults.require(flags.name != "bad-path", "path", "must not be bad");
        faults.finish().map(|_| flags)
    });
    checked.map_err(|errors| errors.to_string())
}

/// As [`read`], with a file of this text.
fn read_file(text: &str, args: &[&str]) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.toml");
    fs::write(&path, text).unwrap();
    let config = format!("--config={}", path.display());
    let outcome = read(&[&[config.as_str()], args].concat());
    outcome.map_err(|text| text.replace(&path.display().to_string(), "FILE"))
}

/// The lines of faults.
fn faults(outcome: Outcome) -> Vec<String> {
    let text = outcome.unwrap_err();
    let mut lines: Vec<_> = text.lines().skip(1).map(|line| line.trim().to_owned()).collect();
    lines.sort();
    lines
}

#[test]
fn words_that_belong_to_no_flag_are_left_out_and_returned() {
    for (args, expected) in [
        (&["--off", "true"][..], &["true"][..]),
        (&["true", "--name", "x", "--off"], &["true"]),
        (&["-v", "8", "word", "--off"], &["word"]),
        (&["-v8", "7", "--off=true"], &["7"]),
        (&["--off", "", "-"], &["", "-"]),
        (&["--off", "--", "--name=y", "-z"], &["--name=y", "-z"]),
    ] {
        let (flags, words) = read(args).unwrap();
        assert!(flags.off, "{args:?}");
        assert_eq!(words, expected, "{args:?}");
    }
    assert_eq!(read(&["-v", "8"]).unwrap().0.verbosity, 8);
}

#[test]
fn every_fault_of_the_command_line_is_reported_at_once() {
    let found = faults(read(&[
        "--port=x",
        "--nam=1",
        "--keepalive-time=10",
        "--colour=blue",
        "--off=maybe",
        "-x",
        "--name=bad",
        "--nothing-like-it",
        "--size=",
    ]));
    let expected = [
        "--colour: \"blue\" is unknown; use red or green",
        "--keepalive-time: \"10\": a unit is missing",
        "--nam: is unknown; did you mean --name?",
        "--name: must not be bad",
        "--nothing-like-it: is unknown; see --help",
        "--off: \"maybe\": write true or false",
        "--port: \"x\" is not a whole number",
        "--size: ",
        "-x: is unknown; see --help",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found} is not {expected}");
    }
    assert_eq!(faults(read(&["--name"])), ["--name: needs a value"]);
}

#[test]
fn help_and_version_are_printed_although_there_are_faults() {
    assert!(read(&["--help"]).unwrap_err().contains("--keepalive-time"));
    assert_eq!(read(&["--port=x", "--version"]).unwrap_err(), "sample 1.2.3\n");
    assert!(read(&["--completion=bash"]).unwrap_err().contains("--keepalive-time"));
}

#[test]
fn help_names_the_program() {
    for (program, usage) in
        [("/usr/bin/proxy-x", "proxy-x"), ("sample precheck", "sample precheck")]
    {
        let args = [program, "--help"].map(OsString::from);
        let help = CommandLine::<Sample>::read(&mut command::<Sample>(), args).unwrap_err().text;
        assert!(help.contains(&format!("Usage: {usage} [OPTIONS]")), "{help}");
    }
}

#[test]
fn words_are_named_beside_the_faults_of_flags() {
    let expected =
        ["\"statsu\": is no command and belongs to no flag; see --help", "--port: must be above 0"];
    assert_eq!(faults(read(&["statsu", "--port=0"])), expected);
    assert_eq!(faults(read(&["--port=x", "statsu"])).len(), 2);
}

#[test]
fn keys_of_the_file_are_flags() {
    let text = "
        # a comment
        name = 'n'
        port = 7
        off = true
        v = 8
        keepalive_time = '2m'
        size = 4096
        rules = ['a,b', 'c']
        list = ['x', 'y']
        colour = 'green'
        cargo = 'c'
    ";
    let (flags, words) = read_file(text, &[]).unwrap();
    assert_eq!((flags.name.as_str(), flags.port, flags.off, flags.verbosity), ("n", 7, true, 8));
    assert_eq!(
        (flags.keepalive_time.to_string().as_str(), flags.size),
        ("2m0s", Some(ByteSize(4096)))
    );
    assert_eq!((flags.rules, flags.list.as_str()), (vec!["a,b".to_owned(), "c".into()], "x,y"));
    assert_eq!((flags.colour, flags.cargo.as_str(), words.len()), (Colour::Green, "c", 0));
    let (flags, _) = read_file("size = '2Mi'\nkeepalive-time = 0\nrules = 'z'", &[]).unwrap();
    assert_eq!((flags.size, flags.rules), (Some(ByteSize(2 << 20)), vec!["z".to_owned()]));
}

#[test]
fn the_command_line_and_the_environment_win_over_the_file() {
    let text = "name = 'file'\nport = 7\nrules = ['file']\npath = 'file'\nv = 1\noff = true";
    let args = ["--name=line", "--old-rules=line", "-v", "8", "--off=false"];
    let (flags, _) = read_file(text, &args).unwrap();
    assert_eq!((flags.name.as_str(), flags.port, flags.verbosity), ("line", 7, 8));
    assert_eq!((flags.rules, flags.off), (vec!["line".to_owned()], false));
    assert_ne!(flags.path, "file");
    assert!(!flags.path.is_empty());
}

#[test]
fn every_fault_of_the_file_is_reported_with_those_of_the_command_line() {
    let text = "
        nam = 'n'
        port = '7'
        off = 'true'
        v = true
        keepalive-time = 10
        colour = 'blue'
        list = [1]
        name = ['a']
        config = 'other'
        old-rules = 'a'
        rules = 'b'
        [size]
        a = 1
    ";
    let found = faults(read_file(text, &["--keepalive-time=1x", "--off=false", "--path"]));
    let expected = [
        "--keepalive-time: \"1x\": ",
        "--path: needs a value",
        "FILE: colour: \"blue\" is unknown; use red or green",
        "FILE: config: belongs on the command line",
        "FILE: keepalive-time: \"10\": a unit is missing",
        "FILE: list: has the wrong type, a number; write a text in quotes, as in list = ",
        "FILE: nam: is unknown; did you mean name?",
        "FILE: name: takes one value and not a list; write a text in quotes, as in name = ",
        "FILE: off: has the wrong type, a text in quotes; write off = true or off = false",
        "FILE: port: has the wrong type, a text in quotes; write a number without quotes",
        "FILE: rules: is the same flag as old-rules; keep one of them",
        "FILE: size: is a table; write all keys at the top of the file",
        "FILE: v: has the wrong type, true or false without quotes; write a number",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found} is not {expected}");
    }
}

#[test]
fn a_fault_of_the_configuration_names_the_place_of_its_value() {
    assert_eq!(faults(read_file("port = 0", &[])), ["FILE: port: must be above 0"]);
    assert_eq!(faults(read_file("port = 1", &["--port=0"])), ["--port: must be above 0"]);
    let both = faults(read_file("name = 'bad'", &["--port=0"]));
    assert_eq!(both, ["--port: must be above 0", "FILE: name: must not be bad"]);
    // PATH is a variable of every process.
    let of_variable = faults(read_file("name = 'bad-path'\npath = 'x'", &[]));
    assert_eq!(of_variable, ["PATH: must not be bad"]);
    let on_the_line = faults(read(&["--name=bad-path", "--path=x"]));
    assert_eq!(on_the_line, ["--path: must not be bad"]);
}

#[test]
fn a_later_text_about_a_flag_names_the_place_of_its_value() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.toml");
    fs::write(&path, "port = 7\noff = true").unwrap();
    let config = format!("--config={}", path.display());
    let args = ["sample", &config, "--off=false"].map(OsString::from);
    let line = CommandLine::<Sample>::read(&mut command::<Sample>(), args).unwrap();
    let located = |text| line.sources().locate(text).replace(&path.display().to_string(), "FILE");
    assert_eq!(located("--port: cannot listen: in use"), "FILE: port: cannot listen: in use");
    assert_eq!(located("--path: is unused"), "PATH: is unused");
    let text = "faults:\n  --port: is --off's\n  --off: is set\nsee --port: there";
    let expected = "faults:\n  FILE: port: is --off's\n  --off: is set\nsee --port: there";
    assert_eq!(located(text), expected);
}

#[test]
fn a_file_of_another_program_has_a_hundred_faults_at_most() {
    let text: String = (0..10_000).map(|key| format!("key-{key:06} = 1\n")).collect();
    let lines = faults(read_file(&text, &["--port=0"]));
    assert_eq!(lines.len(), 102, "and the flag's own, and how many keys are left");
    let rest = "--config: FILE has 100 faults before key-000100, and 9900 keys are unread";
    assert_eq!(lines[0], rest);
}

#[test]
fn a_file_that_cannot_be_used_is_a_fault_beside_the_others() {
    let found = faults(read(&["--config=/no/such/file.toml", "--port=0"]));
    assert!(found[0].starts_with("--config: cannot read /no/such/file.toml: "), "{found:?}");
    assert_eq!(found[1], "--port: must be above 0");
    let found = faults(read_file("port = 1\nname n", &[]));
    assert!(found[0].starts_with("--config: FILE, line 2: not TOML: "), "{found:?}");
    let found = faults(read_file("port = 1\nport = 2", &[]));
    assert!(found[0].starts_with("--config: FILE, line 2: not TOML: duplicate key"), "{found:?}");
    read(&["--config="]).unwrap();
}

#[test]
fn nothing_counts_as_missing_where_the_file_cannot_be_read() {
    let missing = |args: &[&str]| {
        let args = ["sample"].iter().chain(args).map(OsString::from);
        let line = CommandLine::<Sample>::read(&mut command::<Sample>(), args).unwrap();
        let checked = line.configuration(|flags| {
            let mut faults = Faults::new();
            faults.require(!flags.cargo.is_empty(), "cargo", "must be given");
            faults.finish().map(|_| ())
        });
        faults(Err(checked.unwrap_err().to_string()))
    };
    assert_eq!(missing(&[]), ["--cargo: must be given"]);
    let found = missing(&["--config=/no/such/file.toml"]);
    assert!(found.len() == 1 && found[0].starts_with("--config: cannot read "), "{found:?}");
}
