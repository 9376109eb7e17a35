//! Konnectivity's programs and kube-apiserver's client library, built by Go.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use culvert_loadtest::{konnectivity_client::KonnectivityClient, peer::konnectivity::Programs};
use tokio::sync::OnceCell;

/// Skips the tests that need Go.
const WITHOUT_GO: &str = "CULVERT_WITHOUT_GO";

/// The programs.
#[derive(Debug)]
pub(crate) struct Konnectivity {
    pub(crate) programs: Programs,
    pub(crate) client: KonnectivityClient,
}

/// The programs, built once; `None` when the tests that need them are skipped.
pub(crate) async fn konnectivity() -> Option<&'static Konnectivity> {
    static KONNECTIVITY: OnceCell<Konnectivity> = OnceCell::const_new();
    if super::skips(WITHOUT_GO) {
        return None;
    }
    Some(KONNECTIVITY.get_or_init(build).await)
}

async fn build() -> Konnectivity {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let programs = Programs::build(folder).await.unwrap();
    let client = KonnectivityClient::build(folder).await.unwrap();
    let (Some(programs), Some(client)) = (programs, client) else {
        panic!("Go is not installed; {WITHOUT_GO}=1 skips the tests that need it")
    };
    Konnectivity { programs, client }
}

/// Whether the tests that need Go are to run.
pub(crate) fn has_go() -> bool {
    !super::skips(WITHOUT_GO)
}

/// Builds a program of a Go module in `loadtest`, with a command of Go such as `build`, whose
/// packages are last. The first time takes minutes.
pub(crate) fn go(module: &str, command: &[&str], program: &str, packages: &[&str]) -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(program);
    let built = Command::new("go")
        .args(command)
        .arg("-o")
        .arg(&program)
        .args(packages)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(module))
        .output();
    let built = built.unwrap_or_else(|error| {
        panic!("Go cannot be started ({error}); {WITHOUT_GO}=1 skips the tests that need it")
    });
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    program
}
