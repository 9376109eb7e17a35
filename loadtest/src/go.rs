//! Go, with which Konnectivity's programs are built.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
};

/// Where Go's own archive and distributions put it. The `PATH` of sudo has none of these.
const USUAL: [&str; 4] = ["/usr/local/go/bin", "/usr/lib/go/bin", "/opt/go/bin", "/snap/bin"];

/// The program `go`: of `PATH`, else of `GOROOT`, of the home folder or of a usual folder.
pub(crate) fn find() -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).unwrap_or_default();
    let of_user = Path::new(&variable("HOME")).join(".local/go/bin");
    let folders = env::split_paths(&variable("PATH")).collect::<Vec<_>>().into_iter();
    let others = [Path::new(&variable("GOROOT")).join("bin"), of_user].into_iter();
    in_folders(folders.chain(others).chain(USUAL.map(PathBuf::from)))
}

/// What to do without Go.
pub(crate) fn missing() -> String {
    format!(
        "Go is neither in PATH nor in GOROOT, ~/.local/go/bin, {}. Konnectivity and \
         kube-apiserver's gRPC client are built with it: install it, or compare without them, with \
         --peer=culvert-connect --peer=direct",
        USUAL.join(", ")
    )
}

fn in_folders(folders: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    let is_absolute = |folder: &PathBuf| folder.is_absolute();
    let programs = folders.filter(is_absolute).map(|folder| folder.join(OsStr::new("go")));
    programs.into_iter().find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_folder_with_a_file_of_that_name_counts() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str| folder.path().join(name);
        for name in ["without", "folder/go", "first", "second"] {
            std::fs::create_dir_all(of(name)).unwrap();
        }
        for name in ["first/go", "second/go"] {
            std::fs::write(of(name), "").unwrap();
        }
        let folders = ["without", "folder", "first", "second"].map(of).into_iter();
        let relative = std::iter::once(PathBuf::from("."));
        assert_eq!(in_folders(relative.chain(folders)), Some(of("first/go")));
        assert_eq!(in_folders(std::iter::once(of("without"))), None);
        assert!(missing().contains("/usr/local/go/bin") && missing().contains("--peer=direct"));
    }
}
