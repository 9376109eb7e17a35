use culvert_process::{go_flags, test_util::FlagFiles};
use culvert_wire::identifiers::Identifier;

use super::*;

/// The files that flags may name.
struct Files(FlagFiles);

impl Files {
    fn new() -> Self {
        Self(FlagFiles::new())
    }

    /// The configuration of `args`, with `@name` standing for the path of that file.
    fn config_as(&self, argv0: &str, args: &[&str]) -> Result<Config, String> {
        self.0.config(argv0, args)
    }

    /// As a Culvert agent with a CA, unless `args` say otherwise.
    fn config(&self, args: &[&str]) -> Result<Config, String> {
        self.config_as("culvert-agent", &[&["--ca-cert=@ca"], args].concat())
    }
}

#[test]
fn default_ports_depend_on_the_name_of_the_program() {
    let files = Files::new();
    for (argv0, ports) in
        [("/proxy-agent", [8091, 8093, 8094]), ("/culvert-agent", [8132, 8136, 8135])]
    {
        let config = files.config_as(argv0, &["--ca-cert=@ca"]).unwrap();
        let found =
            [config.servers.port, config.health_address.port(), config.admin_address.port()];
        assert_eq!(found, ports, "{argv0}");
        assert_eq!(config.health_address.ip().to_string(), "::");
        assert_eq!(config.admin_address.ip().to_string(), "127.0.0.1");
    }
}

#[test]
fn defaults_are_konnectivitys() {
    let config = Files::new().config(&[]).unwrap();
    assert_eq!(config.agent_id.as_str().len(), 36, "a UUID: {}", config.agent_id);
    assert_eq!(config.servers.host, "127.0.0.1");
    assert_eq!(config.servers.certificate, None);
    assert_eq!(config.servers.token_file, None);
    assert_eq!(config.servers.keep_alive_interval, Duration::from_secs(3600));
    let sync = SyncConfig {
        interval: Duration::from_secs(1),
        interval_cap: Duration::from_secs(10),
        forever: false,
        leases: None,
        count_source: CountSource::Leases,
    };
    assert_eq!(config.sync, sync);
    assert_eq!(config.tunnel, TunnelConfig::default());
    assert_eq!(config.dial_timeout, Duration::from_secs(5));
    assert_eq!(config.drain_timeout, Duration::from_secs(20));
    assert_eq!(config.max_streams, 10_000);
    assert_eq!(config.warnings, [""; 0]);
}

#[test]
fn kamajis_command_line_is_understood() {
    let config = Files::new()
        .config_as(
            "/proxy-agent",
            &[
                "--admin-server-port=8133",
                "--ca-cert=@ca",
                "--health-server-port=8134",
                "--logtostderr=true",
                "--proxy-server-host=fd00::7",
                "--proxy-server-port=8132",
                "--service-account-token-path=@token",
                "-v=8",
            ],
        )
        .unwrap();
    assert_eq!((config.servers.host.as_str(), config.servers.port), ("fd00::7", 8132));
    assert!(config.servers.token_file.is_some());
    assert_eq!(config.health_address, "[::]:8134".parse().unwrap());
    assert_eq!(config.admin_address, "127.0.0.1:8133".parse().unwrap());
    assert_eq!(config.log.verbosity, 8);
    assert_eq!(config.warnings, [""; 0]);
}

/// Every Konnectivity flag as `--name=value`, as upstream's test runner writes them.
#[test]
fn every_konnectivity_flag_parses_as_go_prints_it() {
    let args = [
        "--admin-bind-address=127.0.0.1",
        "--admin-server-port=50001",
        "--agent-cert=@crt",
        "--agent-id=the-agent",
        "--agent-identifiers=",
        "--agent-key=@key",
        "--alpn-proto=[]",
        "--ca-cert=@ca",
        "--count-server-leases=false",
        "--enable-contention-profiling=false",
        "--enable-profiling=false",
        "--health-server-host=127.0.0.1",
        "--health-server-port=50000",
        "--keepalive-time=1h0m0s",
        "--kube-api-content-type=application/vnd.kubernetes.protobuf",
        "--kubeconfig=",
        "--lease-label=k8s-app=konnectivity-server",
        "--lease-namespace=kube-system",
        "--probe-interval=100ms",
        "--proxy-server-host=127.0.0.1",
        "--proxy-server-port=40001",
        "--server-count-source=default",
        "--service-account-token-path=",
        "--sync-forever=false",
        "--sync-interval-cap=1s",
        "--sync-interval=100ms",
        "--warn-on-channel-limit=false",
        "--xfr-channel-size=150",
    ];
    let config = Files::new().config_as("proxy-agent", &args).unwrap();
    assert_eq!(config.agent_id.as_str(), "the-agent");
    assert_eq!(config.servers.extra_alpn, [""; 0]);
    assert!(config.servers.certificate.is_some());
    assert_eq!(config.sync.interval, Duration::from_millis(100));
    assert_eq!(config.health_address, "127.0.0.1:50000".parse().unwrap());
    assert_eq!(config.warnings, [""; 0]);
}

#[test]
fn the_servers_certificate_is_for_their_host_or_for_the_given_name() {
    let files = Files::new();
    for (host, name) in [
        ("10.0.0.1", "10.0.0.1"),
        ("fd00::1", "fd00::1"),
        ("[fd00::1]", "fd00::1"),
        ("localhost.", "localhost"),
        ("konnectivity.example.com", "konnectivity.example.com"),
    ] {
        let config = files.config(&["--proxy-server-host", host]).unwrap();
        assert_eq!(config.servers.name.to_str(), name);
    }
    let args = ["--proxy-server-host=10.0.0.1", "--server-name=konnectivity.example.com"];
    let servers = files.config(&args).unwrap().servers;
    assert_eq!(servers.host, "10.0.0.1");
    assert_eq!(servers.name.to_str(), "konnectivity.example.com");
}

#[test]
fn each_rule_names_its_flag() {
    let files = Files::new();
    for args in [
        &["--ca-cert="][..],
        &["--ca-cert=@absent"],
        &["--agent-cert=@absent", "--agent-key=@key"],
        &["--agent-cert=", "--agent-key=@key"],
        &["--agent-key=", "--agent-cert=@crt"],
        &["--agent-key=@absent", "--agent-cert=@crt"],
        &["--service-account-token-path=@absent"],
        &["--proxy-server-host="],
        &["--proxy-server-host=[node-1]"],
        &["--proxy-server-host=fe80::1%eth0"],
        &["--proxy-server-host=a b"],
        &["--server-name=a b"],
        &["--proxy-server-port=0"],
        &["--proxy-server-port=65536"],
        &["--health-server-port=0"],
        &["--health-server-port=-1"],
        &["--admin-server-port=0"],
        &["--health-server-host=no such host"],
        &["--admin-bind-address=no such host"],
        &["--xfr-channel-size=0"],
        &["--enable-contention-profiling"],
        &["--sync-interval=0"],
        &["--sync-interval=-1s"],
        &["--sync-interval-cap=999ms"],
        &["--sync-interval-cap=-1s"],
        &["--probe-interval=-1s"],
        &["--keepalive-time=-1s"],
        &["--agent-identifiers=uid=1"],
        &["--agent-id=nöde"],
        &["--kubeconfig=@absent"],
        &["--lease-label-selector=", "--count-server-leases"],
        &["--server-count-source=min"],
        &["--dial-timeout=0"],
        &["--drain-timeout=-1s"],
        &["--max-streams=0"],
        &["--mtu-cap=100"],
    ] {
        let flag = args[0].split('=').next().unwrap();
        let text = files.config(args).unwrap_err();
        assert!(text.contains(&format!("{flag}: ")), "{args:?}: {text}");
    }
}

#[test]
fn a_proxy_that_cannot_be_used_is_a_fault_only_where_it_would_be_used() {
    let files = Files::new();
    let found = |args: &[&str], no_proxy: &str| {
        let args: Vec<_> = [&["--ca-cert=@ca", "--proxy-server-host=192.0.2.1"], args].concat();
        let args = ["culvert-agent".to_owned()].into_iter().chain(files.0.expand(&args));
        let flags = go_flags::try_parse_from::<Flags>(args.map(Into::into)).unwrap();
        let mut faults = Faults::new();
        let servers = servers(&flags, Invocation::Culvert, &mut faults);
        let variable = |name| match name {
            "HTTPS_PROXY" => Some("socks5://proxy:1080".to_owned()),
            "NO_PROXY" => Some(no_proxy.to_owned()),
            _ => None,
        };
        assert_eq!(proxies(&flags, servers.as_ref(), variable, &mut faults), Proxies::default());
        faults.finish().map_err(|faults| faults.to_string())
    };
    assert!(found(&[], "").unwrap_err().contains("HTTPS_PROXY: "));
    for (args, no_proxy) in [(&[][..], "192.0.2.0/24"), (&[], "*"), (&["--transport=quic"], "")] {
        let warnings = found(args, no_proxy).unwrap();
        assert!(warnings[0].starts_with("HTTPS_PROXY: "), "{warnings:?}");
    }
}

#[test]
fn several_faults_are_reported_together() {
    let text = Files::new()
        .config_as("proxy-agent", &["--sync-interval=20s", "--xfr-channel-size=0", "--mtu-cap=1"])
        .unwrap_err();
    for flag in ["--ca-cert: ", "--sync-interval-cap: ", "--xfr-channel-size: ", "--mtu-cap: "] {
        assert!(text.contains(flag), "{flag} in {text}");
    }
}

#[test]
fn profiles_are_of_the_processor_alone() {
    let files = Files::new();
    assert!(!files.config(&[]).unwrap().profiling);
    let profiling = files.config(&["--enable-profiling"]).unwrap();
    assert!(profiling.profiling && profiling.warnings.is_empty(), "{:?}", profiling.warnings);
    let flags = ["--enable-profiling", "--enable-contention-profiling"];
    let warnings = files.config(&flags).unwrap().warnings;
    assert!(warnings[0].starts_with("--enable-contention-profiling: "), "{warnings:?}");
}

#[test]
fn a_flag_without_effect_causes_a_warning() {
    let files = Files::new();
    for arg in ["--xfr-channel-size=20", "--log-dir=/var/log", "--admin-server-port=8136"] {
        let flag = arg.split('=').next().unwrap();
        let warnings = files.config(&[arg]).unwrap().warnings;
        assert_eq!(warnings.len(), 1, "{arg}: {warnings:?}");
        assert!(warnings[0].starts_with(&format!("{flag}: ")), "{warnings:?}");
    }
}

#[test]
fn parsed_values_reach_the_configuration() {
    let config = Files::new()
        .config(&[
            "--agent-id=node-1",
            "--agent-identifiers=ipv4=10.0.0.7&default-route=true",
            "--alpn-proto=a,b",
            "--alpn-proto=[c]",
            "--sync-forever",
            "--server-count-source=max",
            "--count-server-leases",
            "--lease-label-selector=a=b",
            "--drain-timeout=0",
        ])
        .unwrap();
    assert_eq!(config.agent_id.as_str(), "node-1");
    let identifiers = [("ipv4", "10.0.0.7"), ("default-route", "true")];
    let identifiers = identifiers.map(|(key, value)| Identifier::new(key, value).unwrap());
    assert_eq!(config.identifiers[..], identifiers);
    assert_eq!(config.servers.extra_alpn, ["a", "b", "c"]);
    assert!(config.sync.forever);
    assert_eq!(config.sync.count_source, CountSource::Larger);
    assert_eq!(config.sync.leases.unwrap().selector, "a=b");
    assert_eq!(config.drain_timeout, Duration::ZERO);
}

#[test]
fn help_describes_every_flag() {
    let mut command = go_flags::command::<Flags>();
    let help = command.render_long_help().to_string();
    for arg in command.get_arguments() {
        let name = arg.get_long().unwrap();
        assert!(arg.is_hide_set() || help.contains(&format!("--{name}")), "{name} in {help}");
        assert!(arg.get_help().is_some(), "{name} has no help");
        assert!(
            arg.get_help_heading().is_some() || ["completion", "help", "version"].contains(&name),
            "{name} belongs under a heading"
        );
    }
}

#[test]
fn files_that_cannot_be_used_are_reported_with_all_other_faults() {
    let files = Files::new();
    let folder = files.0.path("");
    for name in ["crt", "ca", "token"] {
        std::fs::write(folder.join(name), " ").unwrap();
    }
    let flags = ["--agent-cert=@crt", "--agent-key=@key", "--service-account-token-path=@token"];
    let text = files.config(&[&flags[..], &["--proxy-server-port=0"]].concat()).unwrap_err();
    for (flag, name, reason) in [
        ("agent-cert", "crt", "holds no certificate"),
        ("ca-cert", "ca", "holds no certificate"),
        ("service-account-token-path", "token", "holds no token"),
    ] {
        let fault = format!("--{flag}: {}: {reason}", folder.join(name).display());
        assert!(text.contains(&fault), "{fault} in {text}");
    }
    assert!(text.contains("--proxy-server-port: "), "{text}");
}

#[test]
fn egress_rules_of_repeated_flags_add_up() {
    let config = Files::new().config(&[
        "--egress-deny=10.0.0.0/8:22,[fd00::/8]:22",
        "--egress-deny=192.168.0.7",
        "--egress-allow=10.0.0.0/8",
        "--egress-exempt=169.254.20.10",
    ]);
    let EgressConfig { policy, policy_file, audit } = config.unwrap().egress;
    assert_eq!(format!("{:?}", policy.deny), "[10.0.0.0/8:22, [fd00::/8]:22, 192.168.0.7]");
    assert_eq!(format!("{:?}", policy.allow), "[10.0.0.0/8]");
    assert_eq!(format!("{:?}", policy.exempt), "[169.254.20.10]");
    assert_eq!((policy_file, audit), (None, false));
}

#[test]
fn every_fault_of_the_egress_policy_is_reported_with_its_flag() {
    let files = Files::new();
    // A token is no policy.
    let faults = files.config(&[
        "--egress-deny=10.0.0.1/8,node-1",
        "--egress-allow=",
        "--egress-exempt=[fd00::/8",
        "--egress-policy-file=@token",
    ]);
    let faults = faults.unwrap_err();
    for fault in [
        "--egress-deny: \"10.0.0.1/8\" has bits set behind its prefix; write 10.0.0.0/8",
        "--egress-deny: \"node-1\" is no rule",
        "--egress-allow: holds no rule; omit the flag to allow everything",
        "--egress-exempt: \"[fd00::/8\" is no rule",
        "1: a line begins with exempt, deny or allow",
    ] {
        assert!(faults.contains(fault), "{fault} in {faults}");
    }
}

#[test]
fn an_audit_of_the_egress_policy_is_warned_of() {
    let config = Files::new().config(&["--egress-audit"]).unwrap();
    assert!(config.egress.audit);
    assert_eq!(config.warnings.len(), 1);
    assert!(config.warnings[0].starts_with("--egress-audit: "), "{:?}", config.warnings);
}

#[test]
fn a_configuration_file_has_the_checks_of_the_flags() {
    let files = Files::new();
    let text = "ca-cert = '@ca'\nproxy-server-host = 'servers.test'\nagent-id = 'of-the-file'\n\
                egress-deny = ['10.0.0.1', '10.0.0.2']\nsync-forever = true\n";
    let path = files.0.path("file.toml");
    std::fs::write(&path, &files.0.expand(&[text])[0]).unwrap();
    let args = ["--config=@file.toml", "--agent-id=of-the-line"];
    let config: Config = files.0.config("culvert-agent", &args).unwrap();
    assert_eq!((config.agent_id.as_str(), config.sync.forever), ("of-the-line", true));
    assert_eq!(config.servers.host, "servers.test");
    std::fs::write(&path, "ca-cert = '/nowhere/ca'\negress-deny = ['x']\ntransport = 'udp'")
        .unwrap();
    let text = files.0.config::<Config>("culvert-agent", &["--config=@file.toml"]).unwrap_err();
    for fault in [
        "@file.toml: ca-cert: /nowhere/ca does not exist",
        "@file.toml: egress-deny: ",
        "@file.toml: transport: \"udp\" is unknown; use auto, quic or tcp",
    ] {
        let fault = &files.0.expand(&[fault])[0];
        assert!(text.contains(fault), "{fault} in {text}");
    }
}
