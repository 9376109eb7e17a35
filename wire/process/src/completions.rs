//! `completions SHELL`: prints a completion script.

use std::ffi::OsString;

use clap::{Command, Parser};
use clap_complete::Shell;

use crate::go_flags::{self, Exit};

const NAME: &str = "completions";

/// Prints a completion script for a shell
#[derive(Debug, Parser)]
struct Completions {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// The command, for help and completion scripts.
pub(crate) fn command() -> Command {
    go_flags::command::<Completions>().name(NAME)
}

/// The script for `program`, if the arguments ask for one; the program's path is the first of them.
pub(crate) fn run(program: &mut Command, args: &[OsString]) -> Option<Exit> {
    if args.get(1)?.to_str()? != NAME {
        return None;
    }
    let name = OsString::from(format!("{} {NAME}", program.get_name()));
    let rest = std::iter::once(name).chain(args.iter().skip(2).cloned());
    let parsed = go_flags::try_parse_from(rest);
    Some(match parsed {
        Ok(Completions { shell }) => go_flags::completion(program, shell),
        Err(exit) => exit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(args: &[&str]) -> Option<Exit> {
        let mut program = Command::new("sample")
            .arg(clap::Arg::new("port").long("port"))
            .subcommand(Command::new("agents"))
            .subcommand(command());
        let args: Vec<_> = args.iter().map(OsString::from).collect();
        run(&mut program, &args)
    }

    #[test]
    fn a_script_has_the_flags_and_the_commands_of_the_program() {
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            let exit = exit(&["/bin/sample", "completions", shell]).unwrap();
            assert_eq!(exit.code, 0);
            for text in ["sample", "port", "agents", "completions"] {
                assert!(exit.text.contains(text), "{text} of {shell} is not in\n{}", exit.text);
            }
        }
    }

    #[test]
    fn a_shell_is_needed_and_other_words_are_no_command() {
        for args in [&["sample", "completions"][..], &["sample", "completions", "csh"]] {
            let exit = exit(args).unwrap();
            assert_eq!(exit.code, 1, "{args:?}");
            assert!(exit.text.contains("SHELL") || exit.text.contains("csh"), "{}", exit.text);
        }
        for args in [&["sample"][..], &["sample", "--port"], &["sample", "x", "completions"]] {
            assert_eq!(exit(args), None);
        }
    }
}
