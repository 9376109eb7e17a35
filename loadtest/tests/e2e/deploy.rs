//! The rendered manifests: their arguments are ones that the programs take, their parts fit
//! together, and kubelet and kube-apiserver accept them.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use culvert_process::go_flags;
use k8s_openapi::{
    api::{
        core::v1::{Container, Pod, PodSpec, VolumeMount},
        networking::v1::{NetworkPolicy, NetworkPolicyEgressRule},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The objects of a rendered file.
fn objects_of(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(deploy().join("helm/rendered").join(name)).unwrap();
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    assert!(!objects.is_empty(), "{name}");
    objects
}

/// The objects of all rendered files, each with its file.
fn objects() -> Vec<(String, Value)> {
    let entries = fs::read_dir(deploy().join("helm/rendered")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let objects = names
        .flat_map(|name| objects_of(&name).into_iter().map(move |object| (name.clone(), object)));
    objects.collect()
}

fn parsed<T: DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error} in {value:#}"))
}

/// The Pods of all rendered files, and those of templates.
fn pods() -> Vec<(String, PodSpec)> {
    let specs = objects().into_iter().filter_map(|(name, object)| match &object["kind"] {
        Value::String(kind) if kind == "Pod" => Some((name, parsed(&object["spec"]))),
        _ => object["spec"]["template"].get("spec").map(|spec| (name, parsed(spec))),
    });
    let pods: Vec<_> = specs.collect();
    assert!(pods.len() >= 6, "{} Pods were found", pods.len());
    pods
}

fn container(pod: &PodSpec) -> &Container {
    let [container] = &pod.containers[..] else { panic!("{pod:?}") };
    container
}

/// Value of a flag of the container.
fn flag<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    let args = container.args.iter().flatten();
    args.filter_map(|arg| arg.strip_prefix(name)?.strip_prefix('=')).next_back()
}

#[test]
fn the_programs_take_the_arguments_of_all_manifests() {
    let (mut servers, mut agents) = (0, 0);
    for (file, pod) in pods() {
        let container = container(&pod);
        let command = container.command.iter().flatten().chain(container.args.iter().flatten());
        let command: Vec<OsString> = command.map(OsString::from).collect();
        assert!(command.len() > 5, "{file} {command:?}");
        let fault = match command[0].to_str().unwrap() {
            "/culvert-server" => {
                servers += 1;
                go_flags::try_parse_from::<culvert_server::config::Flags>(command).err()
            }
            "/culvert-agent" => {
                agents += 1;
                go_flags::try_parse_from::<culvert_agent::config::Flags>(command).err()
            }
            other => panic!("{other}"),
        };
        assert!(fault.is_none(), "{file} {fault:?}");
    }
    assert!(servers >= 2 && agents >= 4, "{servers} servers and {agents} agents were found");
}

#[test]
fn the_variables_in_arguments_are_set_and_the_files_are_mounted() {
    let (mut variables, mut paths) = (0, 0);
    for (file, pod) in pods() {
        let container = container(&pod);
        let set: Vec<_> = container.env.iter().flatten().map(|env| env.name.as_str()).collect();
        let mounts = container.volume_mounts.iter().flatten();
        let mounts: Vec<_> = mounts.map(|mount| Path::new(&mount.mount_path)).collect();
        for value in container.args.iter().flatten().filter_map(|arg| arg.split_once('=')) {
            let (flag, value) = value;
            for variable in value.split("$(").skip(1).map(|rest| rest.split(')').next().unwrap()) {
                assert!(set.contains(&variable), "{flag} of {file}");
                variables += 1;
            }
            if value.starts_with('/') {
                let is_mounted = mounts.iter().any(|mount| Path::new(value).starts_with(mount));
                assert!(is_mounted, "{flag}={value} of {file}: {mounts:?}");
                paths += 1;
            }
        }
    }
    assert!(variables >= 4 && paths >= 15, "{variables} variables, {paths} paths were found");
}

#[test]
fn containers_have_no_privileges_and_have_probes_and_requests() {
    for (file, pod) in pods() {
        let container = container(&pod);
        let security = container.security_context.as_ref().unwrap();
        assert_eq!(security.read_only_root_filesystem, Some(true), "{file}");
        assert_eq!(security.allow_privilege_escalation, Some(false), "{file}");
        let dropped = security.capabilities.as_ref().unwrap().drop.as_deref();
        assert_eq!(dropped, Some(&["ALL".to_owned()][..]), "{file}");
        let profile = pod.security_context.as_ref().unwrap().seccomp_profile.as_ref().unwrap();
        assert_eq!(profile.type_, "RuntimeDefault", "{file}");
        assert!(container.liveness_probe.is_some(), "{file}");
        let resources = container.resources.as_ref().unwrap();
        assert!(resources.requests.is_some() && resources.limits.is_some(), "{file}");
        assert!(
            pod.priority_class_name.as_deref().is_some_and(|name| name.starts_with("system-")),
            "{file}"
        );
    }
}

/// What `HasAPIObjectReference` and the admission of mirror Pods demand in kubelet's
/// `tryDecodeSinglePod`: no reference to another object, and names.
#[test]
fn kubelet_can_start_the_static_pod_without_the_cluster() {
    let objects = objects_of("kubeadm-static-pod.yaml");
    let [object] = &objects[..] else { panic!("not one object but {objects:?}") };
    assert_eq!((&object["apiVersion"], &object["kind"]), (&"v1".into(), &"Pod".into()));
    let pod: Pod = parsed(object);
    assert_eq!(pod.metadata.name.as_deref(), Some("culvert-server"));
    assert_eq!(pod.metadata.namespace.as_deref(), Some("kube-system"));
    let spec = pod.spec.unwrap();
    assert_eq!(spec.service_account_name, None);
    assert_eq!(spec.image_pull_secrets, None);
    assert_eq!(spec.node_name, None);
    assert_eq!(spec.host_network, Some(true));
    assert_eq!(spec.priority_class_name.as_deref(), Some("system-node-critical"));
    assert!(matches!(spec.restart_policy.as_deref(), None | Some("Always")));
    for volume in spec.volumes.iter().flatten() {
        let is_local = volume.host_path.is_some() || volume.empty_dir.is_some();
        assert!(is_local, "{volume:?} is of another object");
    }
    let container = container(&spec);
    assert_eq!(container.env_from, None);
    for source in container.env.iter().flatten().filter_map(|env| env.value_from.as_ref()) {
        assert!(source.field_ref.is_some(), "{source:?}");
    }
    for port in container.ports.iter().flatten() {
        assert!(port.host_port.is_none_or(|host| host == port.container_port), "{port:?}");
    }
    let probe = container.liveness_probe.as_ref().unwrap().http_get.as_ref().unwrap();
    assert_eq!(probe.host.as_deref(), Some("127.0.0.1"));
    // The folder of the socket is the host's, for kube-apiserver.
    let socket = Path::new(flag(container, "--uds-name").unwrap());
    let of_socket = |mount: &&VolumeMount| Path::new(&mount.mount_path) == socket.parent().unwrap();
    let mount = container.volume_mounts.iter().flatten().find(of_socket).unwrap();
    let volume = spec.volumes.iter().flatten().find(|volume| volume.name == mount.name).unwrap();
    assert_eq!(volume.host_path.as_ref().unwrap().path, mount.mount_path);
}

#[test]
fn the_release_of_a_static_server_has_no_pod_of_it() {
    let objects = objects_of("kubeadm.yaml");
    assert!(objects.iter().all(|object| object["kind"] != "Pod"), "it would run on one node");
}

#[test]
fn kube_apiserver_finds_the_servers_that_are_rendered_with_its_file() {
    let of = |name: &str| {
        let objects = objects_of(name);
        assert_eq!(objects[0]["apiVersion"], "apiserver.k8s.io/v1beta1");
        objects[0]["egressSelections"][0].clone()
    };
    let by_socket = of("kubeadm-egress-selector.yaml");
    assert_eq!(by_socket["name"], "cluster");
    assert_eq!(by_socket["connection"]["proxyProtocol"], "GRPC");
    let pod: Pod = parsed(&objects_of("kubeadm-static-pod.yaml")[0]);
    let spec = pod.spec.unwrap();
    let server = container(&spec);
    assert_eq!(flag(server, "--mode"), Some("grpc"));
    let socket = &by_socket["connection"]["transport"]["uds"]["udsName"];
    assert_eq!(socket.as_str(), flag(server, "--uds-name"));

    let by_tcp = of("http-connect-egress-selector.yaml");
    assert_eq!(by_tcp["connection"]["proxyProtocol"], "HTTPConnect");
    let objects = objects_of("http-connect.yaml");
    let service = objects.iter().find(|object| object["metadata"]["name"] == "culvert-frontend");
    let service = service.unwrap();
    let (namespace, ports) = (&service["metadata"]["namespace"], &service["spec"]["ports"]);
    let url = format!(
        "https://culvert-frontend.{}.svc:{}",
        namespace.as_str().unwrap(),
        ports[0]["port"]
    );
    let tcp = &by_tcp["connection"]["transport"]["tcp"];
    assert_eq!(tcp["url"], url);
    for file in ["caBundle", "clientCert", "clientKey"] {
        assert!(tcp["tlsConfig"][file].is_string(), "{file}");
    }
}

/// The rule opens this port to these networks.
fn opens(rule: &NetworkPolicyEgressRule, protocol: &str, number: i32) -> bool {
    rule.ports.iter().flatten().any(|port| {
        port.protocol.as_deref() == Some(protocol) && port.port == Some(IntOrString::Int(number))
    })
}

#[test]
fn network_policies_open_the_agents_port_for_both_protocols_and_no_port_to_every_network() {
    let (mut policies, mut agents) = (0, 0);
    for (file, object) in objects().into_iter().filter(|(_, of)| of["kind"] == "NetworkPolicy") {
        policies += 1;
        let spec = parsed::<NetworkPolicy>(&object).spec.unwrap();
        assert_eq!(spec.policy_types.as_deref(), Some(&["Ingress".into(), "Egress".into()][..]));
        let egress = spec.egress.unwrap_or_default();
        if object["metadata"]["name"] == "culvert-agent" {
            agents += 1;
            for protocol in ["UDP", "TCP"] {
                assert!(egress.iter().any(|rule| opens(rule, protocol, 8132)), "{file}");
            }
        } else {
            let text = object["spec"]["ingress"][0]["ports"].to_string();
            assert!(text.contains("\"UDP\"") && text.contains("\"TCP\""), "{file} {text}");
        }
        for rule in &egress {
            let peers = rule.to.as_deref().unwrap_or_default();
            let is_everywhere =
                peers.is_empty() || peers.iter().any(|peer| peer.ip_block.is_some());
            let has_every_port = rule.ports.as_deref().unwrap_or_default().is_empty()
                || rule.ports.iter().flatten().any(|port| port.port.is_none());
            assert!(!is_everywhere || !has_every_port, "{file} {rule:?}");
        }
    }
    assert!(policies >= 2 && agents >= 1, "{policies} policies of {agents} agents were found");
}

#[test]
fn agents_have_a_token_for_servers_alone_and_no_other() {
    let mut tokens = 0;
    for (file, pod) in pods() {
        let Some(token) = flag(container(&pod), "--service-account-token-path") else { continue };
        tokens += 1;
        assert_eq!(pod.automount_service_account_token, Some(false), "{file}");
        let volumes = pod.volumes.iter().flatten().filter_map(|volume| volume.projected.as_ref());
        let mut sources = volumes.flat_map(|volume| volume.sources.iter().flatten());
        let projected = sources.find_map(|source| source.service_account_token.as_ref());
        let projected = projected.unwrap();
        assert_eq!(projected.audience.as_deref(), Some("system:konnectivity-server"), "{file}");
        assert!(token.ends_with(&projected.path), "{file} {token}");
    }
    assert!(tokens >= 3, "{tokens} agents with tokens were found");
}

#[test]
fn the_charts_readme_lists_every_value() {
    let chart = deploy().join("helm/culvert");
    let values = fs::read_to_string(chart.join("values.yaml")).unwrap();
    let readme = fs::read_to_string(chart.join("README.md")).unwrap();
    let mut section = "";
    let mut count = 0;
    for line in values.lines() {
        let indent = line.len() - line.trim_start().len();
        let Some((key, _)) = line.trim().split_once(':') else { continue };
        let name = match indent {
            0 if line.starts_with('#') => continue,
            0 if line.contains('{') => format!("`{key}."),
            0 if !line.trim_end().ends_with(':') => format!("`{key}`"),
            0 => {
                section = key;
                continue;
            }
            2 if !key.starts_with('-') => format!("`{section}.{key}`"),
            _ => continue,
        };
        assert!(readme.contains(&name), "{name} is missing in the chart's README");
        count += 1;
    }
    assert!(count > 40, "{count} values were found");
}

#[test]
fn the_charts_copies_of_rules_and_dashboard_are_equal() {
    for name in ["alerts.yaml", "dashboard.json"] {
        let copy = deploy().join("helm/culvert/files").join(name);
        let original = deploy().join("monitoring").join(name);
        let is_equal = fs::read(copy).unwrap() == fs::read(original).unwrap();
        assert!(is_equal, "{name} in the chart is out of date: run deploy/monitoring/render");
    }
}
