//! The demo does what it says, in a second.

use std::process::Command;

use culvert_loadtest::demo::{self, Options};
use nix::sys::signal::Signal;

use crate::support::{has_program, network::namespace, within};

/// Runs the command in a terminal of its own, sends it the signal once it has drawn, and prints
/// whether the terminal has lines and echo as before.
const IN_A_TERMINAL: &str = r#"
import os, pty, signal, subprocess, sys, termios
number, command = int(sys.argv[1]), sys.argv[2:]
master, terminal = pty.openpty()
before = termios.tcgetattr(terminal)
demo = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=subprocess.STDOUT, start_new_session=True)
drawn = b""
while b"\x1b[J" not in drawn:
    drawn += os.read(master, 4096)
raw = termios.tcgetattr(terminal)[3] & termios.ICANON == 0
demo.send_signal(number)
code = demo.wait()
print("raw" if raw else "not raw", code, termios.tcgetattr(terminal) == before)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_runs_and_goes_down_again() {
    within(async {
        demo::run(&Options { agents: 2, seconds: 1, ..on_loopback() }).await.unwrap();
    })
    .await;
}

fn on_loopback() -> Options {
    Options {
        agents: 1,
        seconds: 1,
        hold: false,
        loss: None,
        delay: None,
        rate: 20.0,
        peers: vec![],
    }
}

#[test]
fn a_signal_ends_the_demo_of_lossy_links_and_restores_the_terminal() {
    if !["python3", "stty"].into_iter().all(has_program) {
        return;
    }
    let Some(host) = namespace() else { return };
    for number in [Signal::SIGTERM, Signal::SIGHUP] {
        let demo = ["demo", "--loss=0", "--peer=direct", "--hold"];
        let mut python = Command::new("python3");
        python.args([
            "-c",
            IN_A_TERMINAL,
            &(number as i32).to_string(),
            env!("CARGO_BIN_EXE_culvert-loadtest"),
        ]);
        let output = host.run(|| python.args(demo).output()).unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let expected = format!("raw {} True", 128 + number as i32);
        assert_eq!(text.trim(), expected, "{output:?}");
    }
}
