//! The images that `deploy/images/build` writes: two builds give the same bytes, their layout is
//! valid, and the programs run under each of their names without privileges and without writing.
//!
//! The programs are this build's `culvert-loadtest`, which is a server or an agent under their names.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use culvert_loadtest::certificates::Certificates;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{has_program, print_skipped, skips};

const SIDES: [&str; 2] = ["culvert-server", "culvert-agent"];
const TAGS: [&str; 3] = ["test", "v0.34.0", "v0.35.0"];
/// Skips the test where it cannot make namespaces.
const WITHOUT_NETNS: &str = "CULVERT_WITHOUT_NETNS";
/// Exit code of the build when Debian packages cannot be downloaded.
const UNREACHABLE: i32 = 3;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Runs a program to its end.
fn output(program: impl AsRef<Path>, args: &[&str]) -> Output {
    Command::new(program.as_ref()).args(args).output().unwrap()
}

/// Standard output of a program that must succeed.
fn stdout(program: impl AsRef<Path>, args: &[&str]) -> String {
    let done = output(&program, args);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{} {args:?}: {errors}", program.as_ref().display());
    String::from_utf8(done.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Whether the build's language is there.
fn has_python() -> bool {
    if !has_program("python3") {
        return false;
    }
    if !output("python3", &["-c", "import tomllib"]).status.success() {
        print_skipped("python3 is older than 3.11");
        return false;
    }
    true
}

/// Whether everything is there that building and running an image takes.
fn has_everything() -> bool {
    let tools = ["dpkg-deb", "objcopy", "readelf", "strip", "tar", "unshare"];
    !skips(WITHOUT_NETNS) && has_python() && tools.into_iter().all(has_program) && can_isolate()
}

/// A folder with the programs to build images from.
fn programs() -> TempDir {
    let folder = tempfile::tempdir_in(root().join("target")).unwrap();
    let [server, agent] = SIDES.map(|side| folder.path().join(side));
    // Symbols would double the time that a build takes.
    stdout("strip", &["-o", text(&server), env!("CARGO_BIN_EXE_culvert-loadtest")]);
    fs::hard_link(server, agent).unwrap();
    folder
}

/// Builds both images into this folder. `None` if Debian packages are missing and there is no
/// network to download them.
fn build(folder: &Path, programs: &Path) -> Option<()> {
    let packages = root().join("target/images/packages");
    let done = Command::new(root().join("deploy/images/build"))
        .args(["--output", text(folder), "--binaries", text(programs)])
        .args(["--packages", text(&packages), "--max-size=0", "--gzip-level=0"])
        .args(["--tag", "test", "--kubernetes-minor", "34", "35"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    if done.status.code() == Some(UNREACHABLE) {
        print_skipped(&errors);
        return None;
    }
    assert!(done.status.success(), "{errors}");
    Some(())
}

/// An image layout in a folder.
struct Layout(TempDir);

impl Layout {
    fn open(archive: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        stdout("tar", &["-xf", text(archive), "-C", text(folder.path())]);
        Self(folder)
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.0.path().join(name)).unwrap()).unwrap()
    }

    /// Path of the blob that a descriptor names, after a check of its size, digest and type.
    fn blob(&self, descriptor: &Value, media_type: &str) -> PathBuf {
        assert_eq!(descriptor["mediaType"], format!("application/vnd.oci.image.{media_type}"));
        let path = self.0.path().join(blob_path(descriptor));
        let digest = path.file_name().and_then(OsStr::to_str);
        assert_eq!(descriptor["size"], fs::metadata(&path).unwrap().len());
        assert_eq!(stdout("sha256sum", &[text(&path)]).split(' ').next(), digest);
        path
    }

    fn blob_json(&self, descriptor: &Value, media_type: &str) -> Value {
        serde_json::from_slice(&fs::read(self.blob(descriptor, media_type)).unwrap()).unwrap()
    }
}

/// Path of the blob that a descriptor names, in the layout.
fn blob_path(descriptor: &Value) -> String {
    format!("blobs/{}", descriptor["digest"].as_str().unwrap().replace(':', "/"))
}

/// Checks the layout of an image, and unpacks its layers into a folder.
fn unpack(layout: &Layout, side: &str, folder: &Path) {
    assert_eq!(layout.json("oci-layout")["imageLayoutVersion"], "1.0.0");
    let index = layout.json("index.json");
    let entries = index["manifests"].as_array().unwrap();
    let annotation = |key: &str| -> Vec<_> {
        entries.iter().map(|entry| entry["annotations"][key].as_str().unwrap()).collect()
    };
    assert_eq!(annotation("org.opencontainers.image.ref.name"), TAGS);
    let names = TAGS.map(|tag| format!("localhost/{side}:{tag}"));
    assert_eq!(annotation("io.containerd.image.name"), names);
    assert!(entries.iter().all(|entry| entry["digest"] == entries[0]["digest"]));

    let manifest = layout.blob_json(&entries[0], "manifest.v1+json");
    let config = layout.blob_json(&manifest["config"], "config.v1+json");
    check_config(&config, side);
    // What `docker load` and `podman load` read.
    let docker = &layout.json("manifest.json")[0];
    assert_eq!(docker["RepoTags"], serde_json::json!(names));
    assert_eq!(docker["Config"], blob_path(&manifest["config"]));
    let layers = manifest["layers"].as_array().unwrap();
    let diffs = config["rootfs"]["diff_ids"].as_array().unwrap();
    assert_eq!(layers.len(), diffs.len());
    assert_eq!(docker["Layers"], layers.iter().map(blob_path).collect::<Value>());
    for (layer, diff) in layers.iter().zip(diffs) {
        let path = layout.blob(layer, "layer.v1.tar+gzip");
        let sum = stdout("sh", &["-c", "gzip -dc \"$0\" | sha256sum", text(&path)]);
        assert_eq!(*diff, format!("sha256:{}", sum.split(' ').next().unwrap()));
        check_owners(&stdout("tar", &["--numeric-owner", "-tvzf", text(&path)]));
        stdout("tar", &["--no-same-owner", "-xzf", text(&path), "-C", text(folder)]);
    }
}

/// Checks that all files belong to root, and that the image's user can read them and not write.
/// While they run here, they belong to that user.
fn check_owners(listing: &str) {
    for line in listing.lines() {
        assert!(line.contains(" 0/0 "), "{line}");
        let others = &line[7..10];
        let expected = match &line[..1] {
            "l" => "rwx",
            "d" if line.ends_with(" root/") => "---",
            "d" if line.ends_with(" tmp/") => "rwt",
            "d" => "r-x",
            _ if line.contains("/bin/") => "r-x",
            _ => "r--",
        };
        // Shared libraries may be executable.
        assert!(others == expected || (expected, others) == ("r--", "r-x"), "{line}");
    }
}

fn check_config(config: &Value, side: &str) {
    let konnectivity = side.replace("culvert", "proxy");
    assert_eq!(config["os"], "linux");
    assert_eq!(config["config"]["User"], "65532:65532");
    assert_eq!(config["config"]["Entrypoint"], serde_json::json!([format!("/{konnectivity}")]));
    let labels = &config["config"]["Labels"];
    for key in ["title", "version", "licenses", "created"] {
        assert!(labels[format!("org.opencontainers.image.{key}")].is_string(), "{key}: {labels}");
    }
}

/// Programs of an image, in a namespace with its files alone, which cannot be written.
struct Root<'a>(&'a Path);

impl Root<'_> {
    /// Runs a program as the image's user.
    fn run(&self, args: &[&str]) -> Output {
        let enter = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && \
                     exec unshare --user --net --map-user=65532 --map-group=65532 \
                     --root=\"$0\" --wd=/ \"$@\"";
        let outer = ["--user", "--map-root-user", "--mount", "sh", "-c", enter, text(self.0)];
        Command::new("unshare").args(outer).args(args).env_clear().output().unwrap()
    }

    /// Everything that a program prints.
    fn prints(&self, args: &[&str]) -> String {
        let done = self.run(args);
        [done.stdout, done.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat()
    }
}

/// Checks what runs in an image, and as what.
fn check_programs(root: &Path, side: &str) {
    let inside = Root(root);
    for folder in ["", "/bin", "/usr/bin"] {
        for name in [side.to_owned(), side.replace("culvert", "proxy")] {
            let path = format!("{folder}/{name}");
            let version = inside.prints(&[&path, "--version"]);
            assert!(version.contains(env!("CARGO_PKG_VERSION")), "{path}: {version}");
            check_ports(&inside, &path, side);
        }
    }
    assert!(inside.run(&["/bin/sh", "-c", "sleep 0"]).status.success());
    let written = inside.prints(&["/bin/sh", "-c", "echo > /tmp/file"]);
    assert!(written.contains("Read-only file system"), "{written}");
    let program = stdout("find", &[text(root), "-type", "f", "-size", "+3M"]);
    assert_eq!(program.trim(), text(&root.join("usr/bin").join(side)), "one copy of the program");
}

/// A program has Konnectivity's default ports under Konnectivity's names, and its own otherwise.
fn check_ports(inside: &Root<'_>, path: &str, side: &str) {
    let server = [
        "--insecure-allow-unauthenticated-agents",
        "--uds-name=/tmp/socket",
        "--server-port=0",
        "--cluster-cert=/etc/culvert/server.crt",
        "--cluster-key=/etc/culvert/server.key",
    ];
    let agent = ["--proxy-server-host=127.0.0.1", "--ca-cert=/etc/ssl/certs/ca-certificates.crt"];
    let konnectivity = path.contains("proxy");
    let (flags, ports): (&[_], _) = match (side, konnectivity) {
        ("culvert-server", true) => (&server, [8091, 8092, 8095]),
        ("culvert-server", false) => (&server, [8132, 8134, 8133]),
        (_, true) => (&agent, [8091, 8093, 8094]),
        (_, false) => (&agent, [8132, 8136, 8135]),
    };
    let printed = inside.prints(&[&[path, "precheck"], flags].concat());
    for port in ports {
        assert!(printed.contains(&format!(":{port} ")), "{path}: no {port} in {printed}");
    }
}

/// Whether this process may make the namespaces that the programs run in.
fn can_isolate() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let attempt = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && \
                   exec unshare --user --net --map-user=65532 --map-group=65532 true";
    let outer = ["--user", "--map-root-user", "--mount", "sh", "-c", attempt, text(folder.path())];
    let done = output("unshare", &outer);
    if !done.status.success() {
        print_skipped(&format!("no namespaces: {}", String::from_utf8_lossy(&done.stderr)));
    }
    done.status.success()
}

#[test]
fn the_dockerfile_and_the_manifests_name_this_version() {
    let version = env!("CARGO_PKG_VERSION");
    let read = |path: &str| fs::read_to_string(root().join("deploy").join(path)).unwrap();
    let label = format!("org.opencontainers.image.version={version} ");
    let dockerfile = read("images/Dockerfile");
    assert_eq!(dockerfile.matches(&label).count(), 1);
    for side in SIDES {
        assert!(dockerfile.contains(&format!("FROM image AS {side}\n")), "{side}");
        let image = format!("image: localhost/{side}:{version}\n");
        assert!(read("helm/rendered/http-connect.yaml").contains(&image), "{side}");
    }
}

/// A build that cannot work: its exit code, and what it prints.
fn fault(args: &[&str]) -> (Option<i32>, String) {
    let done = output(root().join("deploy/images/build"), args);
    (done.status.code(), String::from_utf8(done.stderr).unwrap())
}

#[test]
fn a_build_without_programs_or_packages_names_the_remedy() {
    if !has_python() || !has_program("apt-get") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = ["--arch=amd64", "--output", text(folder.path())];
    let binaries = ["--binaries", text(folder.path())];
    let (code, text) = fault(&[&output[..], &binaries].concat());
    assert!(code == Some(1) && text.contains("culvert-agent is missing"), "{code:?} {text}");

    for side in SIDES {
        fs::write(folder.path().join(side), "").unwrap();
    }
    let (code, text) = fault(&[&output[..], &binaries, &["--tag=a:b"]].concat());
    assert!(code == Some(1) && text.contains("not a tag: a:b"), "{code:?} {text}");
    let closed = ["--mirror=http://127.0.0.1:1"];
    let (code, text) = fault(&[&output[..], &binaries, &closed].concat());
    assert!(code == Some(UNREACHABLE) && text.contains("--packages"), "{code:?} {text}");

    let lock = fs::read_to_string(root().join("deploy/images/packages.lock")).unwrap();
    let line = lock.lines().find(|line| line.starts_with("libc6 ")).unwrap();
    let name = line.split(' ').take(3).collect::<Vec<_>>().join("_") + ".deb";
    fs::write(folder.path().join("packages").join(name), "of an attacker").unwrap();
    let (code, text) = fault(&[&output[..], &binaries, &closed].concat());
    assert!(code == Some(1) && text.contains("SHA-256 differs"), "{code:?} {text}");
}

/// Cargo is replaced: a build of release programs takes ten minutes.
#[test]
fn a_build_without_binaries_has_cargo_build_both_programs() {
    if !has_python() || !has_program("apt-get") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("tools")).unwrap();
    fs::write(
        path("tools/cargo"),
        "#!/bin/sh\necho \"$CULVERT_COMMIT $*\" >\"$CARGO_LOG\"\nexit $CARGO_CODE\n",
    )
    .unwrap();
    fs::set_permissions(path("tools/cargo"), fs::Permissions::from_mode(0o755)).unwrap();
    let build = |code: &str| {
        let tools = format!("{}:{}", path("tools").display(), std::env::var("PATH").unwrap());
        let done = Command::new(root().join("deploy/images/build"))
            .args(["--output", text(folder.path()), "--mirror=http://127.0.0.1:1"])
            .env("PATH", tools)
            .env("CULVERT_COMMIT", "0123abcd")
            .envs([("CARGO_LOG", path("log")), ("CARGO_TARGET_DIR", path("built"))])
            .env("CARGO_CODE", code)
            .output()
            .unwrap();
        (done.status.code(), String::from_utf8(done.stderr).unwrap())
    };
    let (code, text) = build("1");
    assert!(code == Some(1) && text.contains("cargo build --release failed"), "{code:?} {text}");
    // The programs are looked at after the packages, for which there is no mirror.
    let (code, text) = build("0");
    assert_eq!(code, Some(UNREACHABLE), "{text}");
    let line = fs::read_to_string(path("log")).unwrap();
    assert_eq!(line, "0123abcd build --release --locked -p culvert-server -p culvert-agent\n");
}

#[test]
fn images_are_reproducible_and_run_without_privileges_and_writes() {
    if !has_everything() {
        return;
    }
    let programs = programs();
    let builds = [(); 2].map(|()| tempfile::tempdir_in(root().join("target")).unwrap());
    for folder in &builds {
        if build(folder.path(), programs.path()).is_none() {
            return;
        }
    }
    let certificates = Certificates::generate().unwrap();
    for side in SIDES {
        let [first, second] = [0, 1].map(|n| builds[n].path().join(format!("{side}.oci.tar")));
        assert!(fs::read(&first).unwrap() == fs::read(second).unwrap(), "{side} differs");
        let files = tempfile::tempdir().unwrap();
        fs::set_permissions(files.path(), fs::Permissions::from_mode(0o755)).unwrap();
        unpack(&Layout::open(&first), side, files.path());
        let mounted = files.path().join("etc/culvert");
        fs::create_dir(&mounted).unwrap();
        let pair = certificates.server();
        fs::copy(pair.certificate, mounted.join("server.crt")).unwrap();
        fs::copy(pair.key, mounted.join("server.key")).unwrap();
        check_programs(files.path(), side);
    }
}
