use std::path::PathBuf;

use culvert_process::{go_flags, test_util::FlagFiles};
use culvert_transport::tls::Tls12;

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

    /// As a Culvert server with a Unix socket and certificates, unless `args` say otherwise.
    fn config(&self, args: &[&str]) -> Result<Config, String> {
        self.config_as("culvert-server", &[&MINIMAL[..], args].concat())
    }
}

const MINIMAL: [&str; 5] = [
    "--uds-name=/run/culvert.socket",
    "--server-port=0",
    "--cluster-cert=@crt",
    "--cluster-key=@key",
    "--cluster-ca-cert=@ca",
];

/// A frontend over TCP in place of the Unix socket.
const TCP: [&str; 5] = [
    "--uds-name=",
    "--server-port=8090",
    "--server-cert=@crt",
    "--server-key=@key",
    "--server-ca-cert=@ca",
];

/// What Kamaji starts the server with, in its order; the paths are ours.
const KAMAJI: [&str; 13] = [
    "--admin-port=8133",
    "--agent-namespace=kube-system",
    "--agent-port=8132",
    "--agent-service-account=konnectivity-agent",
    "--authentication-audience=system:konnectivity-server",
    "--cluster-cert=@crt",
    "--cluster-key=@key",
    "--health-port=8134",
    "--kubeconfig=@kubeconfig",
    "--mode=grpc",
    "--server-count=2",
    "--server-port=0",
    "--uds-name=/run/konnectivity/konnectivity-server.socket",
];

#[test]
fn default_ports_depend_on_the_name_of_the_program() {
    let files = Files::new();
    for (argv0, ports) in [
        ("/proxy-server", [8091, 8092, 8095]),
        ("/culvert-server", [8132, 8134, 8133]),
        ("culvert", [8132, 8134, 8133]),
    ] {
        let config = files.config_as(argv0, &MINIMAL).unwrap();
        let addresses = [config.agents.address, config.health_address, config.admin_address];
        assert_eq!(addresses.map(|address| address.port()), ports, "{argv0}");
        let hosts = addresses.map(|address| address.ip().to_string());
        assert_eq!(hosts, ["::", "::", "127.0.0.1"]);
    }
}

#[test]
fn a_konnectivity_agent_is_pinged_after_the_shorter_of_two_intervals() {
    let interval =
        |flags: &[&str]| Files::new().config(flags).unwrap().konnectivity_keep_alive_interval();
    let tunnels_none = "--tunnel-keep-alive-interval=0";
    assert_eq!(interval(&[]), Some(Duration::from_secs(5)));
    assert_eq!(interval(&["--keepalive-time=2s"]), Some(Duration::from_secs(2)));
    assert_eq!(interval(&["--keepalive-time=0"]), Some(Duration::from_secs(5)));
    assert_eq!(interval(&[tunnels_none]), Some(Duration::from_secs(3600)));
    assert_eq!(interval(&[tunnels_none, "--keepalive-time=0"]), None);
}

#[test]
fn defaults_are_konnectivitys_but_for_the_dial_timeout() {
    let config = Files::new().config(&[]).unwrap();
    assert_eq!(config.server_count, 1);
    assert_eq!(config.server_id.as_str().len(), 36, "a UUID: {}", config.server_id);
    assert_eq!(config.frontend.mode, Mode::Grpc);
    let path = PathBuf::from("/run/culvert.socket");
    assert_eq!(config.frontend.listen, FrontendListen::Unix { path, delete_existing: true });
    assert_eq!(config.frontend.keep_alive_interval, Duration::from_secs(3600));
    assert_eq!(config.frontend.header_timeout, Duration::from_secs(10));
    assert_eq!(config.frontend.max_connections, 20_000);
    assert_eq!(config.agents.keep_alive_interval, Duration::from_secs(3600));
    assert_eq!(config.agents.strategies, [Strategy::Default]);
    assert_eq!(config.agents.dial.limit, Some(Duration::from_secs(10)));
    assert_eq!(config.agents.max_streams, 10_000);
    assert_eq!(config.agents.token, None);
    assert_eq!(config.tunnel, TunnelConfig::default());
    assert_eq!(config.graceful_shutdown_timeout, Duration::ZERO);
    assert_eq!(config.leases, None);
    assert_eq!(config.warnings, [""; 0]);
}

#[test]
fn an_explicit_zero_lets_dials_wait_for_ever() {
    let files = Files::new();
    for (arg, timeout) in [
        ("--backend-dial-timeout=0", None),
        ("--backend-dial-timeout=0s", None),
        ("--backend-dial-timeout=1m30s", Some(Duration::from_secs(90))),
    ] {
        assert_eq!(files.config(&[arg]).unwrap().agents.dial.limit, timeout, "{arg}");
    }
}

#[test]
fn kamajis_command_line_starts_and_asks_agents_for_tokens() {
    let config = Files::new().config_as("/proxy-server", &KAMAJI).unwrap();
    assert_eq!(config.agents.address, "[::]:8132".parse().unwrap());
    assert_eq!(config.admin_address, "127.0.0.1:8133".parse().unwrap());
    assert_eq!(config.health_address, "[::]:8134".parse().unwrap());
    assert_eq!(config.server_count, 2);
    let token = config.agents.token.unwrap();
    assert_eq!(token.namespace, "kube-system");
    assert_eq!(token.service_account, "konnectivity-agent");
    assert_eq!(token.audience, "system:konnectivity-server");
    assert_eq!(config.warnings, [""; 0]);
}

#[test]
fn agents_without_authentication_are_reported_and_authentication_takes_precedence() {
    let files = Files::new();
    const OPEN: &str = "--insecure-allow-unauthenticated-agents";
    let warned =
        |args: &[&str]| files.config_as("/proxy-server", args).unwrap().warnings[0].clone();
    let by_token = warned(&[&KAMAJI[..], &[OPEN]].concat());
    assert!(by_token.contains("--agent-service-account authenticates"), "{by_token}");
    let by_both = warned(&[&KAMAJI[..], &["--cluster-ca-cert=@ca", OPEN]].concat());
    assert!(by_both.contains("--cluster-ca-cert authenticates"), "{by_both}");

    let tokens = ["--agent-namespace", "--agent-service-account", "--authentication-audience"];
    let unproven: Vec<_> = KAMAJI
        .into_iter()
        .filter(|arg| !tokens.iter().any(|token| arg.starts_with(token)))
        .collect();
    let text = files.config_as("/proxy-server", &unproven).unwrap_err();
    assert!(text.contains("--cluster-ca-cert: must be given"), "{text}");
    let open = warned(&[&unproven[..], &[OPEN]].concat());
    assert!(open.contains("NOT AUTHENTICATED"), "{open}");
}

#[test]
fn a_rule_for_ids_needs_a_proof_of_what_it_asks_for() {
    let files = Files::new();
    let rule = |args: &[&str]| files.config(args).map(|config| config.agents.claims.identity);
    let open = "--insecure-allow-unauthenticated-agents";
    assert_eq!(rule(&[]).unwrap(), AgentIdentity::Any);
    let by_node = "--agent-identity=node";
    assert_eq!(rule(&[by_node]).unwrap(), AgentIdentity::Node);
    let by_certificate = "--agent-identity=certificate";
    assert_eq!(rule(&[by_certificate]).unwrap(), AgentIdentity::Certificate);
    let by_token = [&KAMAJI[..], &[by_node]].concat();
    let config = files.config_as("/proxy-server", &by_token).unwrap();
    assert_eq!(config.agents.claims.identity, AgentIdentity::Node);
    for (args, fault) in [
        (vec!["--cluster-ca-cert=", open, by_node], "--agent-identity: node needs"),
        (vec!["--cluster-ca-cert=", open, by_certificate], "--agent-identity: certificate needs"),
        (vec!["--agent-identity=x"], "--agent-identity: \"x\" is unknown; use any, node or"),
        (vec!["--agent-identity-allow=a=b"], "--agent-identity-allow: \"a=b\" is not AGENT="),
        (vec!["--agent-identity-allow=*=default-route,x"], "--agent-identity-allow: \"x\" is not"),
        (vec!["--max-agent-tunnels=0"], "--max-agent-tunnels"),
    ] {
        let text = rule(&args).unwrap_err();
        assert!(text.contains(fault), "{text}");
    }
}

/// Every Konnectivity flag as `--name=value`, the way upstream's test runners write them.
#[test]
fn every_konnectivity_flag_parses_as_go_prints_it() {
    let args = [
        "--admin-bind-address=127.0.0.1",
        "--admin-port=8095",
        "--agent-bind-address=127.0.0.1",
        "--agent-namespace=",
        "--agent-port=8091",
        "--agent-service-account=",
        "--authentication-audience=",
        "--backend-dial-timeout=0s",
        "--cipher-suites=[]",
        "--cluster-ca-cert=@ca",
        "--cluster-cert=@crt",
        "--cluster-key=@key",
        "--delete-existing-uds-file=true",
        "--enable-contention-profiling=false",
        "--enable-lease-controller=false",
        "--enable-profiling=false",
        "--frontend-keepalive-time=1h0m0s",
        "--graceful-shutdown-timeout=0s",
        "--health-bind-address=127.0.0.1",
        "--health-port=8092",
        "--keepalive-time=1h0m0s",
        "--kube-api-content-type=application/vnd.kubernetes.protobuf",
        "--kubeconfig-burst=0",
        "--kubeconfig-qps=0",
        "--kubeconfig=",
        "--lease-label=k8s-app=konnectivity-server",
        "--lease-namespace=kube-system",
        "--mode=grpc",
        "--proxy-strategies=default",
        "--server-bind-address=",
        "--server-ca-cert=",
        "--server-cert=",
        "--server-count=1",
        "--server-id=d7b1a2a6-98f3-4b56-a4a1-2ea0a8a8b1c5",
        "--server-key=",
        "--server-port=0",
        "--tls-min-version=",
        "--uds-name=/tmp/x.sock",
        "--warn-on-channel-limit=true",
        "--xfr-channel-size=10",
    ];
    let config = Files::new().config_as("proxy-server", &args).unwrap();
    assert_eq!(config.server_id.as_str(), "d7b1a2a6-98f3-4b56-a4a1-2ea0a8a8b1c5");
    assert_eq!(config.agents.dial.limit, None);
    assert_eq!(config.warnings, [""; 0]);
}

#[test]
fn tcp_mode_takes_certificates_and_a_client_ca() {
    let files = Files::new();
    let config = files.config(&TCP).unwrap();
    let FrontendListen::Tcp { address, .. } = config.frontend.listen else {
        panic!("{:?}", config.frontend.listen)
    };
    assert_eq!(address, "[::]:8090".parse().unwrap());
    for (last, flag) in [
        ("--server-ca-cert=", "--server-ca-cert:"),
        ("--server-cert=", "--server-cert:"),
        ("--server-key=", "--server-key:"),
        ("--server-port=0", "--server-port:"),
        ("--server-port=80", "--server-port:"),
        ("--server-port=49152", "--server-port:"),
    ] {
        let text = files.config(&[&TCP[..], &[last]].concat()).unwrap_err();
        assert!(text.contains(flag), "{last}: {text}");
        assert_eq!(text.lines().count(), 2, "{last}: {text}");
    }
}

#[test]
fn a_frontend_whose_ca_signs_for_others_too_is_warned_of_unless_it_has_names() {
    let files = Files::new();
    let config = |more: &[&str]| files.config(&[&TCP[..], more].concat()).unwrap();
    let shared = config(&[]);
    assert_eq!(shared.frontend.client_names, [""; 0]);
    assert_eq!(shared.warnings.len(), 1, "{:?}", shared.warnings);
    assert!(shared.warnings[0].contains("agents (--cluster-ca-cert)"), "{:?}", shared.warnings);
    let named = config(&["--server-client-names=kube-apiserver,spiffe://cluster/apiserver"]);
    let names = ["kube-apiserver", "spiffe://cluster/apiserver"];
    assert_eq!(
        (named.frontend.client_names, named.warnings.len()),
        (names.map(String::from).into(), 0)
    );
    let text = files.config(&[&TCP[..], &["--server-client-names=,"]].concat()).unwrap_err();
    assert!(text.contains("--server-client-names: names no client"), "{text}");
    let unused = files.config(&["--server-client-names=a"]).unwrap();
    assert!(unused.warnings[0].contains("has no effect"), "{:?}", unused.warnings);
}

#[test]
fn a_ca_of_agents_that_is_the_clusters_is_warned_of_unless_more_is_asked() {
    let files = Files::new();
    let kubeconfig = files.0.path("cluster.kubeconfig");
    let config = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{ "name": "here", "cluster": {
            "server": "https://127.0.0.1:1", "certificate-authority": files.0.path("ca"),
        } }],
        "users": [{ "name": "me", "user": { "token": "t" } }],
        "contexts": [{ "name": "here", "context": { "cluster": "here", "user": "me" } }],
    });
    std::fs::write(&kubeconfig, config.to_string()).unwrap();
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    let lease = "--enable-lease-controller";
    let warnings = |more: &[&str]| {
        let config = files.config(&[&[kubeconfig.as_str(), lease], more].concat()).unwrap();
        config.warnings
    };
    let warned = warnings(&[]);
    assert_eq!(warned.len(), 1, "{warned:?}");
    assert!(warned[0].contains("--cluster-ca-cert: is the cluster's CA"), "{warned:?}");
    assert_eq!(warnings(&["--agent-identity=node"]), [""; 0]);
}

#[test]
fn each_rule_names_its_flag() {
    let files = Files::new();
    for args in [
        &["--mode=socks"][..],
        &["--server-port=8090"],
        &["--server-cert=@crt"],
        &["--server-key=@key"],
        &["--server-ca-cert=@ca"],
        &["--cluster-cert=@absent"],
        &["--cluster-key=@absent"],
        &["--cluster-ca-cert=@absent"],
        &["--cluster-cert="],
        &["--cluster-key="],
        &["--cluster-ca-cert="],
        &["--agent-port=1023"],
        &["--agent-port=49152"],
        &["--agent-port=0"],
        &["--agent-port=-1"],
        &["--admin-port=80"],
        &["--admin-port=65536"],
        &["--health-port=443"],
        &["--health-port=50000"],
        &["--operator-socket=/a.sock", "--uds-name=/a.sock"],
        &["--agent-bind-address=no such host"],
        &["--admin-bind-address=no such host"],
        &["--health-bind-address=no such host"],
        &["--enable-contention-profiling"],
        &["--agent-namespace=", "--agent-service-account=a", "--authentication-audience=b"],
        &["--agent-service-account=", "--agent-namespace=a", "--authentication-audience=b"],
        &["--authentication-audience=", "--agent-namespace=a", "--agent-service-account=b"],
        &["--kubeconfig=@absent"],
        &["--kubeconfig-burst=-1"],
        &["--proxy-strategies="],
        &["--proxy-strategies=,"],
        &["--proxy-strategies=default,destCIDR"],
        &["--xfr-channel-size=0"],
        &["--xfr-channel-size=-1"],
        &["--tls-min-version=VersionTLS14"],
        &["--cipher-suites=TLS_AES_128_GCM_SHA256,TLS_RSA_WITH_RC4_128_SHA"],
        &["--lease-label=a", "--enable-lease-controller"],
        &["--graceful-shutdown-timeout=-1s"],
        &["--backend-dial-timeout=-1s"],
        &["--keepalive-time=-1s"],
        &["--frontend-keepalive-time=-1s"],
        &["--frontend-header-timeout=0"],
        &["--max-frontend-connections=0"],
        &["--max-streams-per-agent=0"],
        &["--server-count=-1"],
        &["--server-id=nöde"],
        &["--reset-key-file=@absent"],
        &["--mtu-cap=100"],
        &[
            "--server-port=8132",
            "--uds-name=",
            "--server-cert=@crt",
            "--server-key=@key",
            "--server-ca-cert=@ca",
        ],
    ] {
        let flag = args[0].split('=').next().unwrap();
        let text = files.config(args).unwrap_err();
        assert!(text.contains(&format!("{flag}: ")), "{args:?}: {text}");
    }
}

#[test]
fn several_faults_are_reported_together() {
    let text = Files::new()
        .config_as("proxy-server", &["--mode=x", "--agent-port=1", "--xfr-channel-size=0"])
        .unwrap_err();
    for flag in [
        "--mode: ",
        "--server-cert: ",
        "--server-ca-cert: ",
        "--cluster-cert: ",
        "--cluster-ca-cert: ",
        "--agent-port: ",
        "--xfr-channel-size: ",
    ] {
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
fn what_has_no_effect_is_warned_of() {
    let files = Files::new();
    for arg in [
        "--cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
        "--tls-min-version=VersionTLS10",
        "--xfr-channel-size=20",
        "--log-file=/var/log/server.log",
        "--admin-port=8132",
        "--admin-port=8134",
        "--health-port=8132",
        "--insecure-allow-unauthenticated-agents",
    ] {
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
            "--mode=grpc",
            "--mode=http-connect",
            "--delete-existing-uds-file=false",
            "--proxy-strategies=destHost,defaultRoute,default",
            "--tls-min-version=VersionTLS13",
            "--server-id=one",
            "--server-count=0",
            "--kubeconfig-qps=2.5",
            "--reset-key-file=@reset",
            "--graceful-shutdown-timeout=30s",
            "--enable-lease-controller=true",
            "--agent_bind_address=127.0.0.1",
        ])
        .unwrap();
    assert_eq!(config.frontend.mode, Mode::HttpConnect);
    let strategies = [Strategy::DestHost, Strategy::DefaultRoute, Strategy::Default];
    assert_eq!(config.agents.strategies, strategies);
    assert_eq!(config.tls.tls12, Tls12::Off);
    assert_eq!((config.server_id.as_str(), config.server_count), ("one", 1));
    assert_eq!(config.kubernetes.qps, Some(2.5));
    assert!(config.agents.reset_key_file.is_some());
    assert_eq!(config.graceful_shutdown_timeout, Duration::from_secs(30));
    let labels = vec![("k8s-app".to_owned(), "konnectivity-server".to_owned())];
    assert_eq!(config.leases.unwrap().labels, labels);
    assert!(config.agents.address.ip().is_loopback());
}

#[test]
fn help_mentions_every_flag_with_words_of_its_own() {
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
    for name in ["crt", "key", "ca", "kubeconfig", "reset"] {
        std::fs::write(files.0.path(name), " ").unwrap();
    }
    let flags =
        ["--reset-key-file=@reset", "--kubeconfig=@kubeconfig", "--enable-lease-controller"];
    let text = files.config(&[&flags[..], &["--admin-port=1"]].concat()).unwrap_err();
    for fault in [
        "--cluster-cert: @crt: holds no certificate",
        "--cluster-key: @key: holds no private key",
        "--cluster-ca-cert: @ca: holds no certificate",
        "--reset-key-file: @reset: holds no secret",
        "--kubeconfig: ",
        "--admin-port: ",
    ] {
        let fault = &files.0.expand(&[fault])[0];
        assert!(text.contains(fault), "{fault} in {text}");
    }
    // One that nothing is asked with may be anything.
    let other = Files::new();
    std::fs::write(other.0.path("kubeconfig"), "").unwrap();
    other.config(&["--kubeconfig=@kubeconfig"]).unwrap();
}

#[test]
fn a_configuration_file_has_the_checks_of_the_flags() {
    let files = Files::new();
    let text = files.0.expand(&[
        "uds-name = '/run/culvert.socket'\nserver-port = 0\ncluster-cert = '@crt'\n\
         cluster-key = '@key'\ncluster-ca-cert = '@ca'\nmode = 'http-connect'\n\
         agent-identity-allow = ['a=default-route', 'b=default-route']\nagent-identity = 'node'\n",
    ]);
    std::fs::write(files.0.path("file.toml"), &text[0]).unwrap();
    let config = files.config_as("culvert-server", &["--config=@file.toml", "--mode=grpc"]);
    assert_eq!(config.unwrap().frontend.mode, Mode::Grpc);
    let faulty = format!("{}server_count = -1\nagentport = 1\nhealth-port = 'x'\n", text[0]);
    std::fs::write(files.0.path("file.toml"), faulty).unwrap();
    let args = ["--config=@file.toml", "--mode=http", "--admin-port=1"];
    let text = files.config_as("culvert-server", &args).unwrap_err();
    for fault in [
        "--mode: \"http\" is unknown; use grpc or http-connect",
        "--admin-port: 1 is a reserved port",
        "@file.toml: server-count: must be from 0 to",
        "@file.toml: agentport: is unknown; did you mean agent-port?",
        "@file.toml: health-port: has the wrong type",
    ] {
        let fault = &files.0.expand(&[fault])[0];
        assert_eq!(text.matches(fault.as_str()).count(), 1, "{fault} in {text}");
    }
    assert_eq!(text.lines().count(), 6, "{text}");
}

fn server_set(files: &Files, flags: &[&str]) -> Result<ServerSetConfig, String> {
    files.config(flags).map(|config| config.server_set)
}

#[test]
fn servers_have_addresses_with_the_agent_port_by_default() {
    let files = Files::new();
    assert_eq!(server_set(&files, &[]), Ok(ServerSetConfig::default()));
    for (text, address) in [
        ("192.0.2.7", "192.0.2.7:8132"),
        ("192.0.2.7:443", "192.0.2.7:443"),
        ("2001:db8::7", "[2001:db8::7]:8132"),
        ("[2001:db8::7]", "[2001:db8::7]:8132"),
        ("[2001:db8::7]:443", "[2001:db8::7]:443"),
        ("::ffff:192.0.2.7", "192.0.2.7:8132"),
    ] {
        let set = server_set(&files, &[&format!("--advertise-address={text}")]).unwrap();
        assert_eq!(set.advertised, [address.parse().unwrap()].into(), "{text}");
    }
    let both = server_set(&files, &["--advertise-address=192.0.2.7,2001:db8::7"]).unwrap();
    let expected = ["192.0.2.7:8132", "[2001:db8::7]:8132"].map(|text| text.parse().unwrap());
    assert_eq!(both.advertised, expected.into());
    let list = "--server-addresses=a=192.0.2.1, b=[2001:db8::2]:443,";
    let flags = [list, "--server-addresses=c=192.0.2.3", "--agent-port=9000", "--server-id=b"];
    let set = server_set(&files, &flags).unwrap();
    let addresses = set.addresses.iter();
    let addresses = addresses.flat_map(|(id, all)| all.iter().map(move |one| (id.as_str(), one)));
    let addresses: Vec<_> = addresses.map(|(id, address)| (id, address.to_string())).collect();
    let expected = [("a", "192.0.2.1:9000"), ("b", "[2001:db8::2]:443"), ("c", "192.0.2.3:9000")];
    assert_eq!(addresses, expected.map(|(id, address)| (id, address.to_owned())));
    assert_eq!(set.advertised, ["[2001:db8::2]:443".parse().unwrap()].into(), "from the list");
}

#[test]
fn all_faults_of_the_addresses_of_servers_are_reported_together() {
    let files = Files::new();
    let flags = [
        "--server-id=a",
        "--advertise-address=server-1.example.com:8132",
        "--server-addresses=b,c=0.0.0.0,d=192.0.2.1:0,e=[fe80::1%2]:1,=192.0.2.1",
        "--server-addresses=f=192.0.2.1,f=192.0.2.2,f=192.0.2.3,g=ff02::1",
    ];
    let faults = server_set(&files, &flags).unwrap_err();
    for part in [
        "--advertise-address: \"server-1.example.com:8132\" is neither an address",
        "\"b\" is not ID=ADDRESS:PORT",
        "\"0.0.0.0\" is no address of one server",
        "\"192.0.2.1:0\" has no port",
        "\"[fe80::1%2]:1\" has a zone",
        "\"=192.0.2.1\"",
        "\"f\" has more than 2 addresses",
        "\"ff02::1\" is no address of one server",
    ] {
        assert!(faults.contains(part), "{part} in {faults}");
    }
    let many: Vec<_> = (0..65).map(|number| format!("s{number}=192.0.2.1")).collect();
    let many = format!("--server-addresses={}", many.join(","));
    assert!(server_set(&files, &[&many]).unwrap_err().contains("more than 64 addresses"));
    let differs =
        ["--server-id=a", "--advertise-address=192.0.2.1", "--server-addresses=a=192.0.2.2"];
    let fault = server_set(&files, &differs).unwrap_err();
    assert!(fault.contains("must not differ from 192.0.2.2:8132"), "{fault}");
}

#[test]
fn a_list_that_does_not_name_the_server_is_a_warning() {
    let files = Files::new();
    let warnings = |flags: &[&str]| files.config(flags).unwrap().warnings;
    let list = "--server-addresses=a=192.0.2.1";
    let warned = |flags: &[&str]| {
        warnings(flags).iter().any(|warning| warning.contains("does not name this server"))
    };
    assert!(warned(&[list, "--server-id=b"]));
    assert!(!warned(&[list, "--server-id=a"]));
    assert!(!warned(&[list, "--server-id=b", "--advertise-address=192.0.2.2"]));
}
