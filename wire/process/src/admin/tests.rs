use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn serve_on_free_port(routes: Routes) -> AdminServer {
    serve_on("127.0.0.1:0".parse().unwrap(), routes, &Metrics::new("1", &[]).unwrap())
}

fn serve_on(address: SocketAddr, routes: Routes, metrics: &Metrics) -> AdminServer {
    let flags = ListenFlags { port: "health-port", address: "health-bind-address" };
    let port = Port { listener: "health", flags, address };
    AdminServer::start(port, routes, metrics)
}

/// The whole answer to one request on a connection of its own.
async fn exchange(server: &AdminServer, request: &str) -> String {
    let mut stream = TcpStream::connect(server.local_address()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn get(server: &AdminServer, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: node:1\r\nconnection: close\r\n\r\n");
    let answer = exchange(server, &request).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn paths_that_were_added_are_served_under_their_names_and_no_others() {
    let routes = Routes::new().healthz().readyz(|_| AdminResponse::text(StatusCode::OK, "ready"));
    let server = serve_on_free_port(routes);
    for path in ["/readyz", "/ready", "/readyz?verbose"] {
        assert_eq!(get(&server, path).await, (200, "ready".to_owned()), "{path}");
    }
    assert_eq!(get(&server, "/healthz").await, (200, "ok".to_owned()));
    for path in ["/", "/healthz/", "/debug/pprof/", "/metrics"] {
        assert_eq!(get(&server, path).await.0, 404, "{path}");
    }
}

#[test]
fn a_query_is_verbose_with_that_key_alone() {
    for (query, verbose) in [
        ("", false),
        ("verbose", true),
        ("a=b&verbose=1", true),
        ("verbosely", false),
        ("a=verbose", false),
    ] {
        assert_eq!(AdminRequest { query, host: "" }.is_verbose(), verbose, "{query}");
    }
}

#[tokio::test]
async fn metrics_come_as_text_or_from_another_port() {
    let metrics = Metrics::new("1", &[]).unwrap();
    let routes = Routes::new().metrics(&metrics, || "a 1\n".to_owned());
    let server = serve_on_free_port(routes);
    let answer = exchange(&server, "GET /metrics HTTP/1.0\r\n\r\n").await;
    let text = metrics.render(|_| {});
    for line in [
        "promhttp_metric_handler_requests_total{code=\"200\"} 1",
        "promhttp_metric_handler_requests_total{code=\"503\"} 0",
        "promhttp_metric_handler_requests_in_flight 0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    assert!(answer.ends_with("\r\n\r\na 1\n"), "{answer}");

    let server = serve_on_free_port(Routes::new().metrics_on_port(8134));
    for (host, target, location) in [
        ("node:8133", "/metrics", "//node:8134/metrics"),
        ("node", "/metrics?x=1", "//node:8134/metrics?x=1"),
        ("[::1]:8133", "/metrics", "//[::1]:8134/metrics"),
        ("[::1]", "/metrics", "//[::1]:8134/metrics"),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        let answer = exchange(&server, &request).await;
        assert!(answer.starts_with("HTTP/1.1 301 "), "{answer}");
        assert!(answer.contains(&format!("location: {location}\r\n")), "{answer}");
    }
}

#[tokio::test]
async fn an_endless_head_is_refused() {
    let server = serve_on_free_port(Routes::new().healthz());
    let request = format!("GET /healthz HTTP/1.1\r\nx: {}", "y".repeat(MAX_HEADER_BYTES));
    let answer = exchange(&server, &request).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

#[tokio::test]
async fn above_the_limit_a_new_connection_ends_the_oldest() {
    let server = serve_on_free_port(Routes::new().healthz());
    let mut hoard = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        hoard.push(TcpStream::connect(server.local_address()).await.unwrap());
    }
    assert_eq!(get(&server, "/healthz").await.0, 200);
    let mut rest = Vec::new();
    let oldest = hoard[0].read_to_end(&mut rest).await;
    assert!(rest.is_empty() && oldest.is_ok_and(|read| read == 0), "the oldest was ended");
}

#[tokio::test]
async fn stopping_ends_idle_connections_and_frees_the_port() {
    let server = serve_on_free_port(Routes::new().healthz());
    let address = server.local_address();
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut first = [0];
    idle.read_exact(&mut first).await.unwrap();
    server.stop().await;
    let mut rest = String::new();
    idle.read_to_string(&mut rest).await.unwrap();
    assert!(rest.ends_with("ok"), "{rest}");
    listen::tcp(address).unwrap();
}

#[tokio::test]
async fn a_port_that_is_taken_is_served_once_it_is_free() {
    let taken = listen::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let metrics = Metrics::new("1", &[]).unwrap();
    let server = serve_on(taken.local_addr().unwrap(), Routes::new().healthz(), &metrics);
    let unavailable = || {
        let scrape = metrics.render(|_| {});
        scrape.contains("\nculvert_listener_unavailable{listener=\"health\"} 1\n")
    };
    assert!(unavailable());
    drop(taken);
    // The socket above may have accepted by itself; the request after its end is answered.
    tokio::time::pause(); // the next attempt comes at once
    while unavailable() {
        sleep(Duration::from_millis(10)).await;
    }
    tokio::time::resume();
    assert_eq!(get(&server, "/healthz").await, (200, "ok".to_owned()));
}

#[test]
fn the_fault_of_a_port_names_its_flag() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let taken = listen::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = taken.local_addr().unwrap();
    let flags = ListenFlags { port: "admin-port", address: "admin-bind-address" };
    let error = Port { listener: "admin", flags, address }.bind().unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("--admin-port: cannot listen on 127.0.0.1:"), "{text}");
}

#[tokio::test]
async fn a_profile_is_served_behind_its_flag_and_one_at_a_time() {
    let without = serve_on_free_port(Routes::new().profiling(false));
    assert_eq!(get(&without, "/debug/pprof/profile?seconds=1").await.0, 404);
    let server = serve_on_free_port(Routes::new().profiling(true));
    assert_eq!(get(&server, "/debug/pprof/profile?seconds=61").await.0, 400);
    assert!(get(&server, "/debug/pprof/").await.1.contains("/debug/pprof/profile"));
    let request = "GET /debug/pprof/profile?seconds=1 HTTP/1.0\r\n\r\n";
    let taken = async || {
        let mut stream = TcpStream::connect(server.local_address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let head = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap();
        (String::from_utf8_lossy(&answer[9..12]).into_owned(), answer.len() - head - 4)
    };
    let (one, other) = tokio::join!(taken(), taken());
    let mut statuses = [&*one.0, &*other.0];
    statuses.sort_unstable();
    assert_eq!(statuses, ["200", "500"]);
    let profile = if one.0 == "200" { one.1 } else { other.1 };
    assert!(profile > 10, "{profile} bytes");
    assert_eq!(get(&server, "/debug/pprof/goroutine").await.0, 404);
}

#[cfg(not(feature = "heap-profiles"))]
#[tokio::test]
async fn a_build_without_heap_profiles_says_which_has_them() {
    let without = serve_on_free_port(Routes::new().profiling(false));
    assert_eq!(get(&without, "/debug/pprof/heap").await.0, 404);
    let server = serve_on_free_port(Routes::new().profiling(true));
    let (status, text) = get(&server, "/debug/pprof/heap").await;
    assert!(status == 501 && text.contains("--features heap-profiles"), "{status} {text}");
    let (status, text) = get(&server, "/debug/pprof/heap?seconds=30").await;
    assert!(status == 400 && text.contains("-base"), "{status} {text}");
}
