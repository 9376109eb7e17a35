//! The commands of the documents: each block of a shell is run, or says why not, and the flags of
//! the programs are ones that they take.
//!
//! A comment before the block says what happens to it:
//!
//! ```text
//! <!-- test -->                 it is run, and has to succeed
//! <!-- test: expects TEXT -->   it is run until it succeeds and its output contains TEXT
//! <!-- test: background -->     it is started and goes on, as in a terminal of its own
//! <!-- not run: REASON -->      it is not run
//! ```

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs,
    os::unix::{fs::symlink, process::CommandExt as _},
    path::PathBuf,
    process::{Command, Stdio},
};

use clap::Parser;
use culvert_process::command_line::{self, CommandLine};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::{documents, read};
use crate::support::{has_program, network::namespace};

/// The program that is every program of Culvert's, by its name.
const LOADTEST: &str = env!("CARGO_BIN_EXE_culvert-loadtest");
/// Time for all blocks of a document, in seconds.
const TIMEOUT: &str = "120";

/// What a comment says about the block behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Note {
    Run,
    Expects(String),
    Background,
    NotRun(String),
}

impl Note {
    fn of(line: &str) -> Option<Self> {
        let text = line.trim().strip_prefix("<!-- ")?.strip_suffix(" -->")?;
        match text.split_once(": ") {
            None if text == "test" => Some(Self::Run),
            Some(("test", "background")) => Some(Self::Background),
            Some(("test", what)) => Some(Self::Expects(what.strip_prefix("expects ")?.to_owned())),
            Some(("not run", reason)) => Some(Self::NotRun(reason.to_owned())),
            _ => None,
        }
    }
}

/// A block of shell commands in a document.
#[derive(Debug)]
struct Block {
    /// The document, and the line of the block.
    place: String,
    line: usize,
    note: Option<Note>,
    text: String,
}

fn blocks(document: &PathBuf) -> Vec<Block> {
    let text = read(document);
    let mut lines = text.lines().enumerate();
    let (mut found, mut before) = (Vec::new(), "");
    while let Some((number, line)) = lines.next() {
        let opens = line.trim_start().strip_prefix("```");
        if opens.is_some_and(|shell| ["sh", "bash", "shell", "console"].contains(&shell)) {
            let body = lines.by_ref().map(|(_, line)| line);
            let indent = line.len() - line.trim_start().len();
            let body = body.take_while(|line| line.trim() != "```");
            let body: Vec<_> = body.map(|line| line.get(indent..).unwrap_or_default()).collect();
            found.push(Block {
                place: format!("{}:{}", document.display(), number + 1),
                line: number + 1,
                note: Note::of(before),
                text: body.join("\n"),
            });
        }
        if !line.trim().is_empty() {
            before = line;
        }
    }
    found
}

#[test]
fn every_block_of_a_shell_is_run_or_says_why_not() {
    let blocks: Vec<_> = documents().iter().flat_map(blocks).collect();
    assert!(blocks.len() > 30, "only {} blocks found", blocks.len());
    for Block { place, note, .. } in &blocks {
        let remedy = "write <!-- test --> or <!-- not run: REASON --> before it";
        assert!(note.is_some(), "{place}: {remedy}; loadtest/tests/e2e/docs/commands.rs has all");
    }
    assert!(blocks.iter().any(|block| matches!(block.note, Some(Note::Expects(_)))));
}

/// The commands of a script, each as its words. Good for documents: words with quotes, `$(…)`,
/// comments and continued lines.
fn commands(script: &str) -> Vec<Vec<String>> {
    let script = script.replace("\\\n", " ");
    let (mut all, mut command, mut word) = (Vec::new(), Vec::new(), String::new());
    let mut rest = script.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\'' | '"' => word.extend(rest.by_ref().take_while(|next| *next != c)),
            '$' if rest.peek() == Some(&'(') => {
                word.push(c);
                word.extend(rest.by_ref().take_while(|next| *next != ')'));
                word.push(')');
            }
            '#' if word.is_empty() => while rest.next_if(|next| *next != '\n').is_some() {},
            c if c.is_whitespace() || "|;&<>()".contains(c) => {
                if !word.is_empty() {
                    command.push(std::mem::take(&mut word));
                }
                if (c == '\n' || !c.is_whitespace()) && !command.is_empty() {
                    all.push(std::mem::take(&mut command));
                }
            }
            c => word.push(c),
        }
    }
    command.extend(Some(word).filter(|word| !word.is_empty()));
    all.extend(Some(command).filter(|command| !command.is_empty()));
    all
}

/// The commands of a document's blocks that begin with this program, each as its words.
pub(crate) fn command_lines(document: &str, program: &str) -> Vec<Vec<String>> {
    let all = blocks(&document.into()).into_iter().flat_map(|block| commands(&block.text));
    all.filter(|words| words[0] == program).collect()
}

/// The text of the block of a document that contains this.
pub(crate) fn block_with(document: &str, text: &str) -> String {
    let block = blocks(&document.into()).into_iter().find(|block| block.text.contains(text));
    block.unwrap_or_else(|| panic!("no {text} in {document}")).text
}

#[test]
fn a_script_is_split_as_a_shell_does() {
    let script = "a --b='c d' \\\n  e # f\n  g $(h i)=\"j\" | k >l";
    let expected = [&["a", "--b=c d", "e"][..], &["g", "$(h i)=j"], &["k"], &["l"]];
    assert_eq!(commands(script), expected);
}

/// The faults of flags that a process would be started with.
fn fault<F: Parser>(args: &[String]) -> Option<String> {
    let args = args.iter().filter(|arg| !arg.starts_with("--config=")).map(OsString::from);
    match CommandLine::<F>::read(&mut command_line::command::<F>(), args) {
        Ok(line) => line.configuration(|_| Ok(())).err().map(|errors| errors.to_string()),
        Err(exit) => Some(format!("{exit:?}")),
    }
}

/// The fault of a command that asks a running process, by its own help.
fn fault_of_command(side: &str, args: &[String]) -> Option<String> {
    let output = Command::new(LOADTEST).arg(side).args(args).arg("--help").output().unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_flag_or_a_command_that_does_not_exist_is_a_fault() {
    let args = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let fault_of_agent = fault::<culvert_agent::config::Flags>;
    assert_eq!(fault_of_agent(&args("culvert-agent --transport=tcp")), None);
    assert!(fault_of_agent(&args("culvert-agent --no-such-flag=1")).is_some());
    assert!(fault_of_agent(&args("culvert-agent --transport=pigeon")).is_some());
    assert_eq!(fault_of_command("server", &args("agents --json")), None);
    assert!(fault_of_command("server", &args("agents --no-such-flag")).is_some());
}

#[test]
fn every_flag_of_the_programs_in_a_block_is_one_that_they_take() {
    let mut checked = 0;
    for block in documents().iter().flat_map(blocks) {
        for words in commands(&block.text) {
            let at = words.iter().position(|word| {
                let name = word.rsplit('/').next().unwrap();
                ["culvert-server", "culvert-agent"].contains(&name)
            });
            let Some(at) = at else { continue };
            let is_path =
                at > 0 && ["install", "cp", "rm", "daemonset"].contains(&words[0].as_str());
            let is_argument = at > 0 && words[at - 1].starts_with('-') && words[at - 1] != "--";
            if is_path || is_argument {
                continue;
            }
            let words = words[at..].iter().filter(|word| *word != "…" && *word != "precheck");
            let words: Vec<_> = words.cloned().collect();
            let side = if words[0].ends_with("server") { "server" } else { "agent" };
            let is_process = words.get(1).is_none_or(|word| word.starts_with("--"));
            let fault = match side {
                _ if !is_process => fault_of_command(side, &words[1..]),
                "server" => fault::<culvert_server::config::Flags>(&words),
                _ => fault::<culvert_agent::config::Flags>(&words),
            };
            assert!(fault.is_none(), "{}: {words:?}: {}", block.place, fault.unwrap());
            checked += 1;
        }
    }
    assert!(checked > 15, "only {checked} command lines found");
}

/// A script that runs the blocks of a document in order.
fn script(blocks: &[Block]) -> Option<String> {
    let mut script = String::from("set -euo pipefail\n");
    let mut count = 0;
    for Block { line, note, text, .. } in blocks {
        let file = format!("block-{line}.sh");
        let begin =
            format!("echo '--- line {line}'\ncat >{file} <<'THE_BLOCK'\n{text}\nTHE_BLOCK\n");
        let run = match note {
            Some(Note::Run) => format!("bash -euo pipefail {file}\n"),
            Some(Note::Background) => format!("bash -euo pipefail {file} &\n"),
            // It looks again until the time-out: what it waits for sends no event to a shell.
            Some(Note::Expects(text)) => format!(
                "until bash -euo pipefail {file} >{file}.out 2>&1 && grep -qF '{text}' {file}.out\n\
                 do cat {file}.out; sleep 0.1; done\ncat {file}.out\n"
            ),
            Some(Note::NotRun(_)) | None => continue,
        };
        count += 1;
        write!(script, "{begin}{run}").unwrap();
    }
    (count > 0).then_some(script)
}

/// In an empty folder and a network namespace, so that default ports are free.
#[test]
fn the_blocks_of_each_document_that_are_tests_succeed_in_order() {
    if !["bash", "openssl", "python3", "timeout"].into_iter().all(has_program) {
        return;
    }
    let mut count = 0;
    for document in documents() {
        let Some(script) = script(&blocks(&document)) else { continue };
        let Some(host) = namespace() else { return };
        count += 1;
        let folder = tempfile::tempdir().unwrap();
        let programs = folder.path().join("programs");
        fs::create_dir(&programs).unwrap();
        for name in ["culvert-server", "culvert-agent", "culvert-loadtest"] {
            symlink(LOADTEST, programs.join(name)).unwrap();
        }
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut child = host
            .run(|| {
                Command::new("timeout")
                    .args(["--foreground", "--kill-after=5", TIMEOUT, "bash", "-c", &script])
                    .env("PATH", &path)
                    .env_remove("RUST_LOG")
                    .current_dir(folder.path())
                    .stdin(Stdio::null())
                    .stdout(log.try_clone()?)
                    .stderr(log)
                    .process_group(0)
                    .spawn()
            })
            .unwrap();
        let group = Pid::from_raw(child.id().cast_signed());
        let status = child.wait().unwrap();
        // Whatever was started in the background.
        let _ = killpg(group, Signal::SIGKILL);
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        assert!(status.success(), "{}: {status}\n{log}", document.display());
    }
    assert!(count > 0, "no document has a test");
}
