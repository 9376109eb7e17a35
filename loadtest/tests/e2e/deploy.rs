//! The manifests' arguments are ones that the programs take.

use std::{ffi::OsString, fs, path::Path};

use culvert_process::go_flags;

/// The items of the one `args:` list of a manifest.
fn args(manifest: &str) -> Vec<OsString> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes").join(manifest);
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().skip_while(|line| line.trim() != "args:").skip(1);
    let items = lines.map_while(|line| line.trim().strip_prefix("- --"));
    let args: Vec<_> = items.map(|item| OsString::from(format!("--{item}"))).collect();
    assert!(args.len() > 5, "{manifest} has no arguments");
    std::iter::once(OsString::from("culvert")).chain(args).collect()
}

#[test]
fn the_server_takes_its_manifests_arguments() {
    let parsed =
        go_flags::try_parse_from::<culvert_server::config::Flags>(args("server-sidecar.yaml"));
    assert!(parsed.is_ok(), "{parsed:?}");
}

#[test]
fn the_variables_in_arguments_are_set() {
    for manifest in ["server-sidecar.yaml", "agent-daemonset.yaml"] {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes").join(manifest);
        let text = fs::read_to_string(path).unwrap();
        let used = text.split("=$(").skip(1).map(|rest| rest.split(')').next().unwrap());
        let used: Vec<_> = used.collect();
        assert!(!used.is_empty(), "{manifest}");
        for name in used {
            assert!(text.contains(&format!("name: {name}")), "{name} in {manifest}");
        }
    }
}

#[test]
fn the_agent_takes_its_manifests_arguments() {
    let parsed =
        go_flags::try_parse_from::<culvert_agent::config::Flags>(args("agent-daemonset.yaml"));
    assert!(parsed.is_ok(), "{parsed:?}");
}
